"""Imports: packages do not import each other in a circle, and light commands stay light."""

from __future__ import annotations

import ast
import graphlib
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import avcl_jax

ROOT = Path(avcl_jax.__file__).parent
ROOMS_OF_THE_LIBRARY = (
    *("data", "evaluation", "export", "fingerprint", "fingerprint.benchmark", "models"),
    *("objectives", "training"),
)


def _imported(path: Path) -> set[str]:
    """Returns what a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _room(name: str) -> str:
    """Returns the room of a module, both without "avcl_jax."."""
    benchmark = "fingerprint.benchmark"
    return benchmark if f"{name}.".startswith(f"{benchmark}.") else name.partition(".")[0]


def test_rooms_import_each_other_in_one_direction() -> None:
    arrows: dict[str, dict[str, str]] = defaultdict(dict)
    for path in ROOT.rglob("*.py"):
        room = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in _imported(path):
            top, _, rest = name.partition(".")
            assert top not in ("benchmarks", "tests"), (path, name)
            if top == "avcl_jax" and (target := _room(rest)) != room:
                arrows[room][target] = f"{path} imports {name}"
    # Settings are arguments of the library, and only commands read media to prepare them.
    for room in ROOMS_OF_THE_LIBRARY:
        for target in ("configs", "data_prep"):
            assert target not in arrows[room], arrows[room][target]
    # The benchmark of the index is above both: neither needs the other.
    for room in ("evaluation", "fingerprint"):
        for target in ("evaluation", "fingerprint", "fingerprint.benchmark"):
            assert target not in arrows[room], arrows[room][target]
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]  # each is imported by the next
        steps = [arrows[room][target] for target, room in itertools.pairwise(cycle)]
        raise AssertionError("; ".join(steps)) from None


def test_comparing_runs_imports_neither_charts_nor_media() -> None:
    code = (
        "import json, sys; import avcl_jax.evaluation.compare; "
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"matplotlib", "librosa", "av", "cv2", "jax", "sklearn", "numba"}
    assert heavy.isdisjoint(json.loads(run.stdout))


def test_help_of_the_index_comes_without_jax() -> None:
    code = (
        "import contextlib, json, sys\n"
        "from avcl_jax.fingerprint.command import _COMMANDS, main\n"
        "for arguments in ([], *([name] for name in _COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*arguments, '--help'])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: avcl-fingerprint serve" in run.stdout
    heavy = {"jax", "flax", "orbax", "librosa", "scipy"}
    assert heavy.isdisjoint(json.loads(run.stdout.splitlines()[-1]))


def test_help_of_embedding_comes_without_jax() -> None:
    code = (
        "import contextlib, json, sys\n"
        "from avcl_jax.embed.command import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: avcl-embed" in run.stdout
    heavy = {"jax", "flax", "orbax", "librosa", "av", "pyarrow"}
    assert heavy.isdisjoint(json.loads(run.stdout.splitlines()[-1]))


def test_pages_and_cards_draw_without_librosa() -> None:
    modules = ("fingerprint.duplicates_page", "fingerprint.web.preview", "data_prep.card")
    code = "".join(f"import avcl_jax.{name}\n" for name in modules)
    code += "import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Its first use after installation takes 20 s, in which numba compiles.
    assert {"librosa", "numba"}.isdisjoint(json.loads(run.stdout))


def test_a_program_that_may_load_an_encoder_starts_without_jax() -> None:
    code = "import json, sys; import avcl_jax.export; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"jax", "flax", "orbax", "librosa"}.isdisjoint(json.loads(run.stdout))


def test_the_train_step_needs_no_libraries_of_media_and_files() -> None:
    """A machine that only computes has none; see benchmarks.on_gpu."""
    code = (
        "import json, sys\n"
        "from avcl_jax.configs import pretrain\n"
        "from avcl_jax.training.program import build\n"
        "build(pretrain.get_config('demo'))\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = set(json.loads(run.stdout)) - set(sys.stdlib_module_names)
    with_jax = {"jax", "jaxlib", "flax", "optax", "numpy", "etils", "absl", "yaml", "rich"}
    assert {"jax", "flax"} <= packages
    media = {"av", "cv2", "simplejpeg", "soxr", "grain", "pyarrow", "crc32c", "array_record"}
    files = {"orbax", "tensorstore", "tensorboardX", "google", "requests", "sklearn", "matplotlib"}
    assert packages.isdisjoint(media | files), sorted(packages - with_jax)
