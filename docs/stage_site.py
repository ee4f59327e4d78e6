"""Pages of the site in build/docs, from which MkDocs makes site/.

    python docs/stage_site.py           # copies the pages and what they link to
    mkdocs build --strict
    python docs/stage_site.py --check   # the site loads nothing from another host

On GitHub the README and docs/ link to source files and contain maths in TeX. Here the README is the
home page, notebooks and source files that a page links to are pages too, and maths is MathML.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGED, SITE = ROOT / "build/docs", ROOT / "site"
# Pages outside docs/, and the directories whose files are pages whether linked to or not.
NAMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "avcl_jax/weights/small/README.md": "model_card.md",
}
SOURCES = ("avcl_jax/configs",)
_LANGUAGES = {".py": "python", ".toml": "toml", ".txt": "text", ".sh": "sh"}

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(rf"{_FENCE.pattern}|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_BADGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")  # an image of another host: its text stays
_ELSEWHERE = re.compile(r"[a-z]+:|#")  # another site, or a place on the same page
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\w$])\$(?! )([^$]+?)(?<! )\$(?![\w$])", re.DOTALL)


def pages() -> dict[Path, str]:
    """Lists the pages: file -> name below build/docs."""
    docs = {
        path: str(path.relative_to(ROOT / "docs")).replace("README.md", "index.md")
        for path in sorted((ROOT / "docs").rglob("*.md"))
    }
    notebooks = {
        path: f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.py"))
    }
    return {ROOT / file: name for file, name in NAMES.items()} | docs | notebooks


def _markdown(page: Path) -> str:
    """Returns a page as Markdown; cells of a notebook are paragraphs and blocks of code."""
    if page.suffix == ".md":
        return page.read_text()
    cells = re.split(r"^# %%", page.read_text(), flags=re.MULTILINE)[1:]
    parts = []
    for cell in cells:
        kind, _, text = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE))
        elif 'language="bash"' in kind:
            commands = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            parts.append(f"```sh\n{commands}\n```")
        else:
            parts.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _source_of(path: Path) -> Path:
    """Returns the file of a page: of a notebook its source."""
    return path.with_suffix(".py") if path.suffix == ".ipynb" else path


def links(text: str) -> Iterator[str]:
    """Yields the relative links of a page, outside code."""
    for target in _LINK.findall(_CODE.sub("", text)):
        if not _ELSEWHERE.match(target):
            yield target


def linked_files() -> dict[Path, str]:
    """Lists what pages link to and is not a page: file or directory -> name below build/docs.

    Raises:
        FileNotFoundError: if a link of a page leads nowhere.
    """
    listed = pages()
    files: dict[Path, str] = {}
    targets = [ROOT / name for name in SOURCES]
    for page in listed:
        for link in links(_markdown(page)):
            path = Path(os.path.normpath(page.parent / link.partition("#")[0]))
            if not path.exists():
                raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {link}: no such file")
            targets.append(_source_of(path))
    for path in targets:
        inside = sorted(path.glob("*.py")) if path.is_dir() else []
        for file in {path, *inside} - listed.keys():
            name = file.relative_to(ROOT)
            if file.suffix in (".png", ".webp"):
                files[file] = str(name.relative_to("docs"))
            else:
                files[file] = f"source/{name}/index.md" if file.is_dir() else f"source/{name}.md"
    return files


def _outside_code(
    text: str, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]
) -> str:
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [pattern.sub(replace, text[end : code.start()]), code.group()]
        end = code.end()
    return "".join(parts) + pattern.sub(replace, text[end:])


def _relative(target: str, name: str) -> str:
    return os.path.relpath(target, Path(name).parent)


def staged_text(page: Path, names: Mapping[Path, str]) -> str:
    """Returns a page with links between names of the site, MathML, and no image of another host."""

    def link(match: re.Match[str]) -> str:
        target, hash_mark, anchor = match[1].partition("#")
        if _ELSEWHERE.match(match[1]):
            return match[1]
        path = Path(os.path.normpath(page.parent / target))
        return _relative(names[_source_of(path)], names[page]) + hash_mark + anchor

    def maths(match: re.Match[str]) -> str:
        from latex2mathml.converter import convert

        if match[1]:
            return f'\n<div class="maths">{convert(match[1], display="block")}</div>\n'
        return f'<span class="maths">{convert(match[2])}</span>'

    text = _outside_code(_markdown(page), _BADGE, lambda match: match[1])
    text = text.replace("<details>", '<details markdown="1">')  # what is in it is Markdown too
    return _outside_code(_outside_code(text, _LINK, link), _MATHS, maths)


def _source_page(file: Path, names: Mapping[Path, str]) -> str:
    title = file.relative_to(ROOT)
    if file.is_dir():
        rows = [
            f"- [{path.name}]({_relative(name, names[file])})"
            for path, name in sorted(names.items())
            if path.parent == file
        ]
        return f"# {title}\n\n" + "\n".join(rows) + "\n"
    fence, language = "`" * 5, _LANGUAGES.get(file.suffix, "text")
    header = "---\nsearch:\n  exclude: true\n---\n\n"  # code would crowd out the pages
    return f"{header}# {title}\n\n{fence}{language}\n{file.read_text()}{fence}\n"


def stage() -> None:
    """Writes build/docs anew."""
    shutil.rmtree(STAGED, ignore_errors=True)
    listed = pages()
    names = listed | linked_files()
    for file, name in names.items():
        path = STAGED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file in listed:
            path.write_text(staged_text(file, names))
        elif path.suffix == ".md":
            path.write_text(_source_page(file, names))
        else:
            shutil.copyfile(file, path)
    shutil.copytree(ROOT / "docs/assets", STAGED / "assets")


class _Loads(HTMLParser):
    """Addresses that a page loads by itself; links that a reader may follow are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values.get(name) or "" for name in ("src", "srcset", "data")]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(values.get("href") or "")


def loads(site: Path) -> list[str]:
    """Lists what the pages and style sheets of a built site load from other hosts."""
    problems = []
    for path in sorted(site.rglob("*.html")):
        parser = _Loads()
        parser.feed(path.read_text())
        problems += [f"{path}: {a}" for a in parser.addresses if re.match(r"(https?:)?//", a)]
    for path in sorted(site.rglob("*.css")):
        found = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"']+)", path.read_text())
        problems += [f"{path}: {a}" for a in found]
    return problems


def main() -> int:
    """Stages the pages, or checks the built site."""
    parser = argparse.ArgumentParser(description="Stages the pages of the site.")
    parser.add_argument("--check", action="store_true", help="check site/ instead")
    if not parser.parse_args().check:
        stage()
        return 0
    problems = loads(SITE)
    print("\n".join(problems) or f"open {SITE / 'index.html'}; for the search serve that folder")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
