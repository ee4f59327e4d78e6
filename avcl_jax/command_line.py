"""Parsers of command lines, and the end of a command: by an error, a signal, without a reader."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from avcl_jax.errors import ends_a_command, one_line

_Main = Callable[[Sequence[str] | None], int]

UNREAD = 128 + signal.SIGPIPE


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


class _Output:
    """Standard output or error, where SystemExit(UNREAD) takes the place of BrokenPipeError."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ending():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ending():
            self._stream.flush()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # Other threads end with the main one, when that prints something.
            if threading.current_thread() is not threading.main_thread():
                return
            # The buffer goes nowhere, otherwise Python would try again and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise SystemExit(UNREAD) from None


@contextlib.contextmanager
def ends_unread() -> Iterator[None]:
    """Ends a command quietly where its output is no longer read, as by `| head -1`.

    It is not an error then: the status is 141, which a shell reports for `cat` too. SIGPIPE itself
    would also end a command whose client or worker has gone.
    """
    streams = sys.stdout, sys.stderr
    outputs: list[Any] = [_Output(stream) for stream in streams]
    sys.stdout, sys.stderr = outputs
    try:
        yield
    finally:
        try:
            for output in outputs:
                output.flush()
        finally:
            sys.stdout, sys.stderr = streams


def ends_in_one_line(name: str, *, failed: int) -> Callable[[_Main], Callable[..., int]]:
    """Lets a command end by one line after an error that a user can cause and fix.

    Where nobody reads its output it ends quietly. `avcl_jax.main`, whose flags are absl's and which
    also tells its peers, is the only command without it.

    Args:
        name: begins the line.
        failed: exit status then.

    Returns:
        Decorator of a function of the command's arguments (default: those of the process), which
        returns the exit status.
    """

    def decorate(run: _Main) -> Callable[..., int]:
        @functools.wraps(run)
        @ends_unread()
        def main(arguments: Sequence[str] | None = None) -> int:
            # It logs the traceback of every error that it raises.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            try:
                return run(arguments)
            except Exception as error:
                if not ends_a_command(error):
                    raise
                print(f"{name}: {one_line(error)}", file=sys.stderr)
                return failed

        return main

    return decorate
