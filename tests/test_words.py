"""Words of the code: rules of the style that a regular expression can check, room by room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Every package and every loose module.
ROOMS = ["benchmarks", *(f"avcl_jax/{path.name}" for path in sorted((ROOT / "avcl_jax").iterdir()))]
ROOMS = [room for room in ROOMS if list((ROOT / room).glob("*.py")) or room.endswith(".py")]
# A docstring begins with a verb or a noun.
RELATIVE = re.compile(r"(What|Which|Whether|How|When|Where|Those|That)\b")
# An argument is described by a noun phrase, not by a preposition.
PREPOSITION = re.compile(r"\s+[\w*]+: (of|as|in|that|which|where|from|by|for|to|at|on)\b")
PHRASES = re.compile(
    r"(?<!there )(?<!There )\b(is|are) no (?!longer|more|fewer|less)"
    r"|\b(what is|what are|of which|so many|anew|goes on|go on|per cent)\b"
    r"|\b(pictures?|sounds?)\b",
    re.IGNORECASE,
)
# Names of settings, of an attribute, of a class and of other projects; a message of FFmpeg, and a
# text that records contain.
ALLOWED = re.compile(r"\bAudioSet\b|VGG-Sound|\bSound\b|Picture size|none: no picture")


def _violations(path: Path) -> Iterator[str]:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            if RELATIVE.match(docstring):
                yield f"docstring begins with {docstring.split()[0]!r}: {docstring.splitlines()[0]}"
            for line in docstring.splitlines():
                if PREPOSITION.match(line):
                    yield f"argument begins with a preposition: {line.strip()}"
    for line in ALLOWED.sub("", text).splitlines():
        if match := PHRASES.search(line):
            yield f"{match.group()!r}: {line.strip()}"


@pytest.mark.parametrize("room", ROOMS)
def test_words_follow_the_style(room: str) -> None:
    place = ROOT / room
    paths = [place] if place.suffix else sorted(place.rglob("*.py"))
    assert paths
    found = [f"{path.relative_to(ROOT)}: {what}" for path in paths for what in _violations(path)]
    assert not found, "\n" + "\n".join(found)
