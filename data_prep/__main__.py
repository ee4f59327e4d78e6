"""`python -m data_prep COMMAND`: collections of media to records, and the demo's media files.

Nothing is downloaded: each collection's `--help` says where its lists come from.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from types import ModuleType

# Commands that list clips, which `prepare` then prepares: their modules have `add_arguments` and
# `read`.
_COLLECTIONS = {
    "prepare": ("folder_or_table", "a folder of media files, or a table that lists them"),
    "kinetics": ("kinetics", "Kinetics-400, -600, -700 by their official lists"),
    "vggsound": ("vggsound", "VGG-Sound by its official lists"),
    "audioset": ("audioset", "AudioSet by its official lists"),
    "ucf101": ("ucf101", "UCF101 by its official lists"),
    "hmdb51": ("hmdb51", "HMDB51 by its official lists"),
    "esc50": ("esc50", "ESC-50 or ESC-10"),
    "tfds": ("tfds", "a data set of TensorFlow Datasets (TFRecord or ArrayRecord)"),
    "sequence-examples": ("sequence_examples", "SequenceExamples of MediaSequence or DMVR"),
}
# Commands that do something else: their modules have `add_arguments` and `run`.
_OTHERS = {
    "inspect": ("card", "show what a prepared data set holds"),
    "foley": ("foley", "write the demo's media files"),
    "demo": ("demo", "the demo's media files and their records"),
}


class _Help(argparse.HelpFormatter):
    """Shows defaults that say something, keeps paragraphs, and leaves indented ones as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = ("", False, argparse.SUPPRESS)
        shown = isinstance(action.default, (str, int, float)) and action.default not in silent
        return f"{text} (default: %(default)s)" if shown and action.option_strings else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            if not paragraph.startswith(" "):
                paragraph = textwrap.fill(
                    " ".join(paragraph.split()),
                    width,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            paragraphs.append(textwrap.indent(paragraph, indent))
        return "\n\n".join(paragraphs)


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in (_COLLECTIONS | _OTHERS).items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=_Help,
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

    collection = _collection(name)
    parser.description = collection.__doc__
    collection.add_arguments(parser)
    arguments.add_arguments(parser)
    # What `prepare` prepares has no name of its own.
    if name != "prepare":
        parser.set_defaults(name=name.replace("-", "_"))


def _run(args: argparse.Namespace) -> int:
    if args.command in _OTHERS:
        return _other(args.command).run(args) or 0
    from data_prep import prepare

    return prepare.run(args, _collection(args.command).read)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
