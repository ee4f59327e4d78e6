"""`avcl-data COMMAND`: prepares collections of media as records, and renders the demo's media.

Nothing is downloaded: each collection's `--help` names the source of its lists.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from avcl_jax.command_line import Help, Parser, ends_in_one_line

_OTHER_COMMANDS = {
    "inspect": ("card", "show the content of a prepared data set"),
    "foley": ("foley.command", "render the demo's media files"),
    "small": ("small", "make the training records of the encoders that come with the package"),
    "demo": ("demo", "render the demo's media files and prepare their records"),
}


def _commands() -> dict[str, tuple[str, str]]:
    """Returns module and summary of every command.

    Modules of `collections` with a function `read`, which lists the clips to prepare, are
    commands with their own name, and the first line of their docstring is the summary. The other
    commands have a function `run`.
    """
    commands = {}
    for path in sorted(Path(__file__).parent.glob("collections/*.py")):
        module = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "read" for node in module.body):
            summary = (ast.get_docstring(module) or "").partition("\n")[0]
            commands[path.stem.replace("_", "-")] = (f"collections.{path.stem}", summary)
    return {"prepare": commands.pop("folder-or-table"), **commands, **_OTHER_COMMANDS}


@ends_in_one_line("error", failed=1)
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 after a line that states the error.

    Raises SystemExit(2) if the command line is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="avcl-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in _commands().items():
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=Help)
        # Only the command that runs is imported: their dependencies differ.
        if not arguments or arguments[0] != name:
            continue
        module = importlib.import_module(f"avcl_jax.data_prep.{module_name}")
        module.add_arguments(command)
        if hasattr(module, "read"):
            from avcl_jax.data_prep import prepare

            command.description = module.__doc__
            prepare.add_arguments(command)
            # Files of the command `prepare` have no name of their own.
            if name != "prepare":
                command.set_defaults(name=name.replace("-", "_"))
    args = parser.parse_args(arguments)
    return prepare.run(args, module.read) if hasattr(module, "read") else module.run(args)


if __name__ == "__main__":
    sys.exit(main())
