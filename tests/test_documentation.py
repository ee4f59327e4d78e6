"""Every command and all code that the documents show: parsed, and run where it can run here.

Blocks run as they stand, with relative paths, in a copy of the repository that contains a small
run and, under the names that the pages use, media and lists. A block in a new language, or a
command that neither parses nor is known, fails.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
import shlex
import shutil
import subprocess
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from avcl_jax import config_file, main
from tests import documented
from tests.documented import ROOT
from tests.documented_folder import LISTS, SHORTER, Folder

BLOCKS = list(documented.blocks())
COMMANDS = sorted(
    {
        (block.page, command)
        for block in BLOCKS
        if block.language == "sh"
        for command in block.commands
    }
    | set(documented.inline_commands())
)


class _ParsedError(Exception):
    """Raised instead of running a command whose arguments were good."""


def _parse_main(arguments: list[str]) -> None:
    """Builds the config with its overrides, as `avcl_jax.main` does."""
    arguments = config_file.with_files(arguments)
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=["main", *arguments]
    )
    for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]:
        if flag.name not in values:
            values[flag.name] = copy.deepcopy(flag)
    assert values(["main", *arguments]) == ["main"]
    main.function_of("task", config.value.task)
    assert {"name", "execution"} <= set(config.value)  # which main reads


def _parse_module(module: str, arguments: list[str]) -> None:
    original = argparse.ArgumentParser.parse_known_args

    def parse(parser: argparse.ArgumentParser, given: list[str], *_: object) -> None:
        _, unknown = original(parser, given)
        overrides = [word for word in unknown if word.startswith("--config.")]
        assert unknown == overrides
        _parse_main(["--config=configs/pretrain.py", *overrides])
        raise _ParsedError

    package = importlib.util.find_spec(module).submodule_search_locations
    command = importlib.import_module(f"{module}.__main__" if package else module)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse),
        pytest.raises(_ParsedError),
    ):
        command.main(arguments)


def check_parses(command: str) -> None:
    """Fails if a command names a module, config, setting or flag that does not exist."""
    words = documented.words(re.sub(r"\$fold\b", "1", command).removeprefix("PYTHONPATH=. "))
    words[0] = words[0].removeprefix(".venv-bench/bin/")
    match words:
        case ["python", "-m", "avcl_jax.main", *arguments]:
            _parse_main(arguments)
        case ["python", "-m", "pytest" | "venv", *_]:
            pass
        case ["python", "-m", module] | ["python", "-m", module, "COMMAND" | "prepare"]:
            assert importlib.util.find_spec(module)  # named, not shown whole
        case ["python", "-m", module, *arguments]:
            _parse_module(module, arguments)
        case ["avcl-embed", *arguments]:
            _parse_module("avcl_jax.embed.command", arguments)
        case ["avcl-fingerprint", *arguments]:
            _parse_module("avcl_jax.fingerprint.command", arguments)
        case ["avcl-data", "COMMAND" | "prepare"]:  # named, not shown whole
            pass
        case ["avcl-data", *arguments]:
            _parse_module("avcl_jax.data_prep", arguments)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install" | "download", *packages]:
            for name in packages:
                extra = re.fullmatch(r"avcl-jax\[(.*)\]", name)
                assert not extra or f'"{extra[1]}": [' in (ROOT / "setup.py").read_text()
                assert not name.endswith(".txt") or (ROOT / name).exists()
        case ["python", script]:
            assert (ROOT / script).exists()
        case _:
            subprocess.run(["bash", "-n", "-c", command], check=True)
            assert documented.reason_not_to_run(command), f"who knows {words[0]}?"


def test_every_block_says_its_language() -> None:
    for block in BLOCKS:
        assert block.language in documented.LANGUAGES, f"{block.page}:{block.line}"
    for page in documented.PAGES:
        indented = re.findall(r"\n\n    (?:python|pip|avcl|make).*", page.read_text())
        assert not indented, f"{page}: fence these"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[c[:80] for _, c in COMMANDS])
def test_a_documented_command_parses(page: str, command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    check_parses(command)


@pytest.mark.parametrize("command", documented.protocol_commands())
def test_a_protocol_of_the_table_parses(command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if "ablation.py" in command:  # which trains its own encoders, as the table says
        command = command.replace("--config.encoder=RUN ", "")
    check_parses(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m avcl_jax.main --config=configs/pretrain.py --config.stepz=3",
        "python -m avcl_jax.main --config=configs/retrieval.py:nothing --workdir=OUT",
        "avcl-data prepare VIDEOS/",
        "avcl-fingerprint query clip.mp4 --indx films.index",
        "make nothing",
        "pip install 'avcl-jax[nothing]'",
        "avcl-nothing clip.mp4",
    ],
)
def test_what_does_not_exist_does_not_parse(command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):  # each fails in its own way
        check_parses(command)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Folder:
    if not LISTS.exists():
        pytest.skip(f"no official lists in {LISTS}")
    return Folder(tmp_path_factory.mktemp("documented"))


def runnable(block: documented.Block) -> str:
    """The part of a block that runs here, as a script of bash."""
    if block.language == "python":
        return f"python -c {shlex.quote(block.text)}"
    known = [c for c in block.commands if documented.reason_not_to_run(c) is None]
    return documented.as_here("\n".join(known))


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_the_blocks_of_a_page_run(folder: Folder, page: str) -> None:
    shutil.rmtree(folder.path / "films.index", ignore_errors=True)  # every page makes its own
    for block in BLOCKS:
        if block.page != page or block.language not in ("sh", "python"):
            continue
        if any(name in block.text for name in documented.NOT_HERE):
            continue
        folder.run(runnable(block))


@pytest.mark.slow
def test_protocols_of_the_table_run(folder: Folder) -> None:
    ran = []
    for command in documented.protocol_commands():
        config = re.search(r"configs/(\S+)", command)[1]
        if config in SHORTER and documented.reason_not_to_run(command) is None:
            folder.run(documented.as_here(command) + config)
            assert (folder.path / f"out/protocol{config}" / "results.json").exists()
            ran.append(config)
    assert ran == ["cross_modal.py", "temporal.py", "fingerprint.py"]


@pytest.mark.slow
def test_the_example_of_the_readme_prints_sizes_of_features(folder: Folder) -> None:
    (example,) = (b for b in BLOCKS if b.page == "README.md" and b.language == "python")
    assert len([line for line in example.text.splitlines() if line.strip()]) <= 15
    assert re.fullmatch(r"\(\d+, 96\)", folder.run(runnable(example)).splitlines()[-1])
