"""Profiles of a few steps by jax.profiler, from a given step on or after a signal."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
from etils import epath

from avcl_jax import peers
from avcl_jax.processes import StopRequest

_STEPS = 3


class Profiler:
    """Writes WORKDIR/profile/process_N, which TensorBoard and XProf read; each process its own."""

    def __init__(self, workdir: epath.Path, request: StopRequest, *, at: int):
        """Profiles nothing yet.

        Args:
            request: its `profile` is set by a signal, for this process alone.
            at: first step of a profile; 0 for none.
        """
        self._directory = workdir / "profile" / f"process_{jax.process_index()}"
        self._request, self._at = request, at
        self._first, self._step = 0, 0
        self._written: tempfile.TemporaryDirectory[str] | None = None
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def before(self, step: int) -> None:
        """Begins a profile if there is to be one; called before the batch of a step is read."""
        if self._written is None and (step == self._at or self._request.profile):
            self._request.profile = False
            # Local first: the profiler cannot write into object stores.
            self._written = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._written.name)
            self._first = step
        if self._written is not None:
            self._step = step
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def after(self, result: jax.Array) -> None:
        """Ends the profile after its last step.

        Args:
            result: output of the step, which the profile waits for.
        """
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self._written is not None and self._step >= self._first + _STEPS - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes a profile that has begun, also of fewer steps."""
        if self._written is None:
            return
        peers.doing("writes a profile", self._step)
        jax.profiler.stop_trace()
        for path in filter(Path.is_file, Path(self._written.name).rglob("*")):
            # JAX names a profile by its second, and two may end in the same one.
            *above, second, name = path.relative_to(self._written.name).parts
            steps = f"steps_{self._first}_to_{self._step}_{second}"
            target = self._directory.joinpath(*above, steps, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(target)
        self._written.cleanup()
        self._written = None
        print(f"profile of steps {self._first} to {self._step}: {self._directory}", flush=True)
