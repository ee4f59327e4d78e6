"""Writers of metrics that users add by `execution.writers`: Weights & Biases and the like."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import ml_collections
from etils import epath

from avcl_jax.errors import printable
from avcl_jax.experiment import function_of
from avcl_jax.processes import Stopped

# Called with step and values after each log period, by a context manager of config and workdir.
Write = Callable[[int, Mapping[str, float]], object]
Open = Callable[[ml_collections.ConfigDict, epath.Path], contextlib.AbstractContextManager[Write]]


def find_writers(names: Sequence[str]) -> dict[str, Open]:
    """Imports the functions `module:function` that open writers.

    Raises:
        UserError: if there is no such function.
    """
    return {name: function_of("execution.writers", name) for name in names}


class Writers(contextlib.AbstractContextManager["Writers"]):
    """Opened writers of process 0. One that fails is left out from then on: training matters more.

    Leaving the context closes them, with the exception that ends the run. `Stopped` is none: the
    run will resume.
    """

    def __init__(
        self,
        found: Mapping[str, Open],
        config: ml_collections.ConfigDict,
        workdir: epath.Path,
    ):
        """Opens writers."""
        self._opened: dict[str, tuple[Any, Write]] = {}
        for name, function in found.items() if jax.process_index() == 0 else ():
            with _attempt(name):
                manager = function(config, workdir)
                self._opened[name] = manager, manager.__enter__()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands over the values of a log period, in this thread."""
        for name, (manager, write) in list(self._opened.items()):
            with _attempt(name), contextlib.ExitStack() as closing:
                closing.push(manager)
                closing.callback(self._opened.pop, name)
                write(step, values)
                closing.pop_all()  # it did not fail

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Stopped):
            kind = error = trace = None
        for name, (manager, _) in self._opened.items():
            with _attempt(name, unless=error):
                manager.__exit__(kind, error, trace)


@contextlib.contextmanager
def _attempt(name: str, unless: BaseException | None = None) -> Iterator[None]:
    """Prints an error of a writer in one line."""
    try:
        yield
    except Exception as error:  # code of others, and a service that may be gone
        if error is not unless:
            line = printable(" ".join(f"{type(error).__name__}: {error}".split()))
            print(f"writer {name} failed and gets no more metrics: {line}", flush=True)
