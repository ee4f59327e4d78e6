"""`python -m data_prep COMMAND`: collections of media to records, and the demo's media files.

Nothing is downloaded: each collection's `--help` says where its lists come from.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

# Commands that list clips, which `prepare` then prepares: their modules have `add_arguments` and
# `read`.
_COLLECTIONS = {
    "prepare": ("folder_or_table", "a folder of media files, or a table that lists them"),
    "tfds": ("tfds", "a data set of TensorFlow Datasets (TFRecord or ArrayRecord)"),
    "sequence-examples": ("sequence_examples", "SequenceExamples of MediaSequence or DMVR"),
}
# Commands that do something else: their modules have `add_arguments` and `run`.
_OTHERS = {
    "inspect": ("card", "show what a prepared data set holds"),
    "foley": ("foley", "write the demo's media files"),
    "demo": ("demo", "the demo's media files and their records"),
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in (_COLLECTIONS | _OTHERS).items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        # Only the command that runs is imported: their dependencies differ.
        if arguments and arguments[0] == name:
            _declare(name, command)
    return _run(parser.parse_args(arguments))


def _collection(name: str) -> ModuleType:
    return importlib.import_module(f"data_prep.collections.{_COLLECTIONS[name][0]}")


def _other(name: str) -> ModuleType:
    return importlib.import_module(f"data_prep.{_OTHERS[name][0]}")


def _declare(name: str, parser: argparse.ArgumentParser) -> None:
    if name in _OTHERS:
        _other(name).add_arguments(parser)
        return
    from data_prep import arguments

    _collection(name).add_arguments(parser)
    arguments.add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    if args.command in _OTHERS:
        return _other(args.command).run(args) or 0
    from data_prep import prepare

    return prepare.run(args, _collection(args.command).read)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
