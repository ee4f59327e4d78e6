"""`python -m data_prep COMMAND`: collections of media to records, and the demo's media files.

Nothing is downloaded: each collection's `--help` names the source of its lists.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from avcl_jax.errors import UserError, one_line

# Modules of data_prep.collections have `add_arguments`, and `read`, which lists the clips to
# prepare; the others have `add_arguments` and `run`.
_COMMANDS = {
    "prepare": ("collections.folder_or_table", "a folder of media files, or a table of them"),
    "kinetics": ("collections.kinetics", "Kinetics-400, -600, -700 by their official lists"),
    "vggsound": ("collections.vggsound", "VGG-Sound by its official lists"),
    "audioset": ("collections.audioset", "AudioSet by its official lists"),
    "ucf101": ("collections.ucf101", "UCF101 by its official lists"),
    "hmdb51": ("collections.hmdb51", "HMDB51 by its official lists"),
    "esc50": ("collections.esc50", "ESC-50 or ESC-10"),
    "tfds": ("collections.tfds", "a data set of TensorFlow Datasets (TFRecord or ArrayRecord)"),
    "sequence-examples": ("collections.sequence_examples", "examples of MediaSequence or DMVR"),
    "inspect": ("card", "show the content of a prepared data set"),
    "foley": ("foley.command", "write the demo's media files"),
    "demo": ("demo", "the demo's media files and their records"),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Prints defaults that are not empty, and leaves descriptions as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = ("", False, argparse.SUPPRESS)
        visible = isinstance(action.default, (str, int, float)) and action.default not in silent
        return f"{text} (default: %(default)s)" if visible and action.option_strings else text


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status, 1 after a line that states the error."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=_Help
        )
        # Only the command that runs is imported: their dependencies differ.
        if not arguments or arguments[0] != name:
            continue
        module = importlib.import_module(f"data_prep.{module_name}")
        module.add_arguments(command)
        if hasattr(module, "read"):
            from data_prep import prepare

            command.description = module.__doc__
            prepare.add_arguments(command)
            # Files of the command `prepare` have no name of their own.
            if name != "prepare":
                command.set_defaults(name=name.replace("-", "_"))
    args = parser.parse_args(arguments)
    try:
        return prepare.run(args, module.read) if hasattr(module, "read") else module.run(args)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
