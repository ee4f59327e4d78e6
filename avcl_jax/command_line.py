"""Parsers of command lines, and their end by a signal."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn


class Help(argparse.RawDescriptionHelpFormatter):
    """Prints defaults that are not empty, and leaves descriptions as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = ("", False, argparse.SUPPRESS)
        visible = isinstance(action.default, (str, int, float)) and action.default not in silent
        return f"{text} (default: %(default)s)" if visible and action.option_strings else text


class Parser(argparse.ArgumentParser):
    """States errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does, by a KeyboardInterrupt."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
