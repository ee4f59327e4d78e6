"""Prints the tables of docs/options.md: the options of every command, as its --help has them.

.venv/bin/python docs/command_options.py >> build/docs/options.md   # part of `make site`
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def programs() -> dict[str, Callable[[Sequence[str]], object]]:
    """Returns the programs that setup.py installs: name -> function of the arguments."""
    scripts = re.findall(r'"(avcl-[\w-]+)=([\w.]+):(\w+)"', (ROOT / "setup.py").read_text())
    return {
        name: getattr(importlib.import_module(module), function)
        for name, module, function in scripts
    }


def parser_of(main: Callable[[Sequence[str]], object], *command: str) -> argparse.ArgumentParser:
    """Returns the parser whose help a command line prints."""
    parsers: list[argparse.ArgumentParser] = []

    def print_help(parser: argparse.ArgumentParser, file: object = None) -> None:
        parsers.append(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", print_help),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return parsers[0]


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [name for action in subparsers for name in action.choices]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the rows of the table of a command: option or argument, and its meaning."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help is argparse.SUPPRESS:
            continue
        if action.option_strings:
            metavar = formatter._get_default_metavar_for_optional(action)
            names = [", ".join(action.option_strings)]
        else:
            metavar, names = formatter._get_default_metavar_for_positional(action), []
        name = " ".join(filter(None, [*names, formatter._format_args(action, metavar)]))
        required = ". **Required**" if action.option_strings and action.required else ""
        yield f"| `{_cell(name)}` | {_cell(formatter._expand_help(action))}{required} |"


def _text(lines: str) -> str:
    """Returns a description as Markdown, in which indented lines are a block."""
    apart = re.sub(r"^(\S.*\n)(?=  )", r"\1\n", lines.strip(), flags=re.MULTILINE)
    return re.sub(r"^  ", "    ", apart[:1].upper() + apart[1:], flags=re.MULTILINE)


def _table(rows: Iterable[str]) -> str:
    return "\n".join(["| option | meaning |", "|---|---|", *rows])


def sections(program: str, run: Callable[[Sequence[str]], object]) -> Iterator[str]:
    """Yields headings, descriptions and tables of a program and its commands."""
    whole = parser_of(run)
    yield f"## {program}"
    yield _text(whole.description or "")
    parsers = {name: parser_of(run, name) for name in _commands(whole)}
    if not parsers:
        yield _table(_rows(whole))
        return
    rows = {name: list(_rows(parser)) for name, parser in parsers.items()}
    counts = Counter(itertools.chain(*rows.values()))
    shared = {row for row, count in counts.items() if count > 2 and row.startswith("| `-")}
    if len(shared) < 6:  # few enough to be repeated
        shared = set()
    epilogs = Counter(parser.epilog for parser in parsers.values() if parser.epilog)
    for name, parser in parsers.items():
        yield f"### {program} {name}"
        yield _text(parser.description or "")
        if own := [row for row in rows[name] if row not in shared]:
            yield _table(own)
        if others := [row.split("`")[1].split()[0] for row in rows[name] if row in shared]:
            names = ", ".join(f"`{option}`" for option in others)
            target = f"#options-of-several-commands-of-{program}"
            yield f"[Options of several commands]({target}): {names}"
        if epilogs[parser.epilog] == 1:
            yield _text(parser.epilog or "")
    if shared:
        yield f"### Options of several commands of {program}"
        yield _table(row for row in counts if row in shared)
    yield from (_text(epilog) for epilog, count in epilogs.items() if count > 1)


def main() -> None:
    """Prints the sections of all programs."""
    for program, run in programs().items():
        print("", *sections(program, run), sep="\n\n")


if __name__ == "__main__":
    main()
