"""Pages of the site: all in its navigation, with links to files. `make site` builds it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.documented import ROOT


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the packages of its Python tags."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


@pytest.fixture(scope="module")
def stage_site():
    spec = importlib.util.spec_from_file_location("stage_site", ROOT / "docs/stage_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _leaves(entries: list) -> list[str]:
    leaves = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            leaves += _leaves(value) if isinstance(value, list) else [value]
    return leaves


def test_every_page_is_in_the_navigation_once(stage_site) -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    leaves = _leaves(config["nav"])
    assert sorted(leaves) == sorted(
        [*stage_site.pages().values(), "source/avcl_jax/configs/index.md"]
    )


def test_options_of_all_commands_are_listed() -> None:
    done = subprocess.run(
        [sys.executable, "docs/command_options.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    listed = re.findall(r"^## (.*)", done.stdout, re.MULTILINE)
    assert listed == sorted(re.findall(r'"(avcl-[\w-]+)=', (ROOT / "setup.py").read_text()))
    (query,) = re.findall(r"^### avcl-fingerprint query\n(.*?)^###", done.stdout, re.M | re.S)
    assert "\n| `--require {video,audio,both}` | accept only sources " in query
    assert "\n| `--index DIR` | the index. **Required** |\n" in query
    # What many commands share is explained once.
    assert done.stdout.count("| `--short-side PIXELS` | ") == 1
    assert done.stdout.count("`--short-side`") > 7


def test_names_of_the_reference_are_defined() -> None:
    pages = "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))
    names = re.findall(r"^::: (.+)\.(\w+)$", pages, re.MULTILINE)
    assert len(names) == pages.count("\n::: ") > 50
    for module, name in names:
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined = {
            alias
            for node in ast.parse(path.read_text()).body
            for alias in (
                [a.asname or a.name for a in node.names]
                if isinstance(node, ast.ImportFrom)
                else [getattr(node, "name", None)]
            )
        }
        assert name in defined, f"docs/api: {module} has no {name}"


def test_links_of_all_pages_lead_to_files(stage_site) -> None:
    assert ROOT / "avcl_jax/configs/datasets.py" in stage_site.linked_files()


def test_links_follow_the_pages_and_code_stays(stage_site, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stage_site, "ROOT", tmp_path)
    monkeypatch.setattr(stage_site, "NAMES", {"README.md": "index.md"})
    for name in ("README.md", "LICENSE", "docs/data/README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[licence](LICENSE#2) [web](https://a.b/c) [data](docs/data/README.md)\n")
    (tmp_path / "docs/data/README.md").write_text(
        "[home](../../README.md#try-it) `[code](nowhere.md)`\n```sh\n[more](nowhere.md)\n```\n"
    )
    names = stage_site.pages() | stage_site.linked_files()
    assert stage_site.staged_text(tmp_path / "README.md", names) == (
        "[licence](source/LICENSE.md#2) [web](https://a.b/c) [data](data/index.md)\n"
    )
    assert stage_site.staged_text(tmp_path / "docs/data/README.md", names) == (
        "[home](../index.md#try-it) `[code](nowhere.md)`\n```sh\n[more](nowhere.md)\n```\n"
    )
    (tmp_path / "README.md").write_text("[x](gone.md)\n")
    with pytest.raises(FileNotFoundError, match=r"README.md links to gone.md"):
        stage_site.linked_files()


def test_a_notebook_is_a_page_without_images_of_other_hosts(stage_site, tmp_path) -> None:
    notebook = tmp_path / "start.py"
    notebook.write_text(
        "# ---\n# jupyter: x\n# ---\n\n# %% [markdown]\n# # Start\n#\n"
        "# [![Colab](https://a.b/badge.svg)](https://a.b/start)\n\n# %%\nx = 1  # one\n"
        '\n# %% language="bash"\n# ls a \\\n#     b\n'
    )
    page = tmp_path / "README.md"
    page.write_text("[start](start.ipynb)\n")
    names = {notebook: "notebooks/start.md", page: "index.md"}
    assert stage_site.staged_text(page, names) == "[start](notebooks/start.md)\n"
    assert stage_site.staged_text(notebook, names) == (
        "# Start\n\n[Colab](https://a.b/start)\n\n```python\nx = 1  # one\n```\n\n"
        "```sh\nls a \\\n    b\n```\n"
    )


def test_what_a_built_site_loads_from_elsewhere_is_found(stage_site, tmp_path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://a.b">link</a><link rel="canonical" href="https://a.b/page">'
        '<link rel="stylesheet" href="own.css"><script src="//c.d/x.js"></script><img src="a.png">'
    )
    (tmp_path / "own.css").write_text("@import 'https://e.f/y.css'; p {background: url(own.png)}")
    assert [problem.partition(": ")[2] for problem in stage_site.loads(tmp_path)] == [
        "//c.d/x.js",
        "https://e.f/y.css",
    ]
