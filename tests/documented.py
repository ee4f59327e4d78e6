"""The commands and code that the documents show, and how much of them can run here."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
LANGUAGES = ("sh", "python", "csv", "text", "diff")

# Commands that are only parsed: pattern -> reason.
ONLY_PARSED = {
    r"^make (demo|test)\b": "takes minutes, and is what .ci/run and the README's figures run",
    r"\bpip install\b|-m venv\b|^\.venv-bench/": "installs packages",
    r"\b(gs|s3)://": "needs a bucket",
    r"esc50 ESC-50/ --out": "the 50 classes are not here, the ten of ESC-10 are",
    r"--runner=": "needs the extra beam: tests/interop runs it",
    r"pretrain\.py:(kinetics400|kinetics600|vggsound|audioset)": "full size, for accelerators",
    r"\.py:(ucf101|hmdb51|vggsound|audioset)\b": "full size, on a collection nobody may ship",
    r"avcl-data small|\.py:small|=runs/small\b": "trains for most of an hour: "
    "tests/data_prep/test_small.py",
    r"ablation\.py|\.py:esc10\b": "trains many networks: "
    "tests/test_every_command.py and tests/evaluation run these tasks small",
    r"(import|export)_weights\.py": "needs PyTorch's weights: tests/test_import_weights.py",
    r"avcl-fingerprint serve": "never ends: tests/fingerprint/test_serve.py",
    r"-m benchmarks\.|-m pytest\b": "measures or tests for minutes",
    r"compare (OUT OTHER|runs/(ucf101|esc10)_scratch)": "compares results of what is only parsed",
    r"^tar |^mkdir ": "unpacks the archive of an earlier version, for its code",
    r"^export |^\. ": "changes the shell that it is typed into",
}

# Names on a page -> names in the folder where its commands run; all others are there as they stand.
PLACEHOLDERS = {"/data/k600/": "k600/", "=RUN ": "=runs/demo ", "=OUT": "=out/protocol"}
# Code with these needs packages that are not here: tests/test_import_weights.py, tests/interop and
# tests/training/test_writers.py run the same.
NOT_HERE = ("torchvision", "wandb")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page, relative to the repository.
        line: number of its first line.
        language: tag of its fence.
        text: between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell, each in one line; a loop is its body."""
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [" ".join(line.split()) for line in joined]
        return [
            part
            for line in lines
            if line and not re.match(r"(for .* do|done)$|#", line)
            for part in line.split(" && ")
        ]


def blocks() -> Iterator[Block]:
    """Yields the fenced blocks of all pages."""
    for page in PAGES:
        name, inside = str(page.relative_to(ROOT)), None
        for number, line in enumerate(page.read_text().splitlines(), 1):
            fence = re.match(r" *```(.*)", line)
            if inside is None and fence:
                inside = (number + 1, fence[1], list[str]())
            elif inside is not None and fence:
                yield Block(name, inside[0], inside[1], "\n".join(inside[2]) + "\n")
                inside = None
            elif inside is not None:
                inside[2].append(line)
        assert inside is None, f"{name}: a fence is not closed"


def inline_commands() -> Iterator[tuple[str, str]]:
    """Yields page and text of commands in running text and tables; `…` stands for more of them."""
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for text in re.findall(r"`([^`]+)`", prose):
            command = " ".join(text.split())
            if re.match(r"(python -m|avcl-\w+|make) \w", command) and "…" not in command:
                yield str(page.relative_to(ROOT)), command


def protocol_commands() -> list[str]:
    """The commands of the table of protocols of docs/train.md."""
    page = (ROOT / "docs/train.md").read_text()
    table = page[page.index("| | `python -m avcl_jax.main") :].partition("\n\n")[0]
    (command,) = re.findall(r"`(python [^`]*)`", table.splitlines()[0])
    commands = []
    for row in table.splitlines()[2:]:
        file = ""
        for name in re.findall(r"`([\w.:]+)`", row):
            file = name.partition(":")[0] or file
            commands.append(command.replace("…", file + name.removeprefix(file)))
    return commands


def reason_not_to_run(command: str) -> str | None:
    """Why a command is only parsed; None if it is run."""
    return next((why for pattern, why in ONLY_PARSED.items() if re.search(pattern, command)), None)


def words(command: str) -> list[str]:
    """Splits a command as a shell does, without its comment."""
    return shlex.split(command, comments=True)


def as_here(script: str) -> str:
    """Gives placeholders the names that they have in the folder where commands run."""
    for name, stands_here in PLACEHOLDERS.items():
        script = script.replace(name, stands_here)
    return script
