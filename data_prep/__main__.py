"""`python -m data_prep COMMAND`: media files to records, and the demo's media files."""

from __future__ import annotations

import argparse
import importlib
import sys

_COMMANDS = {
    "prepare": "a folder or manifest of media files to records",
    "foley": "write the demo's media files",
    "demo": "the demo's media files and their records",
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        # Only the command that runs is imported: their dependencies differ.
        if arguments and arguments[0] == name:
            importlib.import_module(f"data_prep.{name}").add_arguments(command)
    parsed = parser.parse_args(arguments)
    return importlib.import_module(f"data_prep.{parsed.command}").run(parsed) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
