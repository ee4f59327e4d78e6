"""Speed of a training step: `python -m benchmarks.train_step --json F`.

docs/performance.md has the rows. The sides of a comparison run in turns in fresh processes
with the same threads and the same allocator; parts of our step are compared inside one process. A
row that cannot be measured on this machine is listed as skipped, with the reason.
"""

from __future__ import annotations

import functools
import os
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import measure
from benchmarks.measure import Measured, RowTable, Target

# For both sides alike: glibc keeps freed memory and maps it in pages of 2 MB. By default it maps
# the memory of each step again, and the kernel clears half a million small pages.
_MALLOC = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 10**12, "top_pad": 10**6}
ALLOCATOR = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
_ENCODER = "benchmarks.steps:seconds_of_encoder_steps"
_PYTORCH_ENCODER = "benchmarks.baselines.pytorch_encoder:seconds_of_steps"


def _sides(
    ours: str,
    baseline: str,
    arguments: Mapping[str, Any],
) -> dict[str, Callable[[], float]]:
    """Measurements of our step and of PyTorch's: median seconds of the steps of one process.

    Args:
        ours: "package.module:function" that returns the seconds of each step.
        baseline: the same for PyTorch, with the additional argument `compiled`.
        arguments: arguments of both.
    """

    def median(target: str, **further: Any) -> float:
        return statistics.median(measure.run_child(target, {**arguments, **further}))

    return {
        "ours": functools.partial(median, ours),
        "eager": functools.partial(median, baseline, compiled=False),
        "compiled": functools.partial(median, baseline, compiled=True),
    }


def _over_better(seconds: Mapping[str, list[float]]) -> Measured:
    """Speed of `ours` over that of the better of `eager` and `compiled`."""
    better = min(("eager", "compiled"), key=lambda name: statistics.median(seconds[name]))
    value, detail = measure.ratio(seconds, better, "ours", quantity="seconds")
    return value, {"better": better, **detail}


def over_pytorch(ours: str, baseline: str, sizes: Mapping[str, int], repeats: int) -> Measured:
    """Speed of our step over that of the better of PyTorch's, see `_sides`."""
    measure.need("torch")
    seconds = measure.interleave(_sides(ours, baseline, sizes), repeats=repeats)
    value, detail = _over_better(seconds)
    return value, {**sizes, **detail}


def step_over_pytorch(args: Namespace) -> Measured:
    """Clips per second of our encoder step over those of PyTorch's."""
    measure.need("torchvision")
    sizes = {"batch": args.batch, "steps": args.steps}
    return over_pytorch(_ENCODER, _PYTORCH_ENCODER, sizes, args.repeats)


def demo_step_over_pytorch(args: Namespace) -> Measured:
    """Steps per second of the demo's whole step over those of the same step in PyTorch."""
    return over_pytorch(
        "benchmarks.steps:seconds_of_demo_steps",
        "benchmarks.baselines.pytorch_pretraining:seconds_of_steps",
        {"steps": 5 * args.steps},  # because they are short
        args.repeats,
    )


def demo_part(above: str, below: str, args: Namespace) -> Measured:
    """Seconds of one part of the demo's step over those of another."""
    return measure.ratio(_demo_parts(args.repeats), above, below, quantity="seconds")


@functools.cache
def _demo_parts(repeats: int) -> Mapping[str, list[float]]:
    # More often, because the parts are short.
    return measure.run_child("benchmarks.steps:seconds_of_demo_parts", {"repeats": 4 * repeats})


_ROWS: RowTable[Namespace] = {
    "step_over_pytorch_cpu": ("ratio", Target(">=", 0.8), step_over_pytorch),
    "demo_step_over_pytorch_cpu": ("ratio", Target(">=", 1.2), demo_step_over_pytorch),
    "step_over_encoders": (
        *("ratio", Target("<=", 1.08)),
        functools.partial(demo_part, "step", "encoders"),
    ),
    "device_augment_fraction": (
        *("fraction", Target("<=", 0.05)),
        functools.partial(demo_part, "inputs", "step"),
    ),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("train_step", __doc__, rows=_ROWS, repeats=True)
    parser.add_argument("--batch", type=int, default=2, help="clips per encoder step")
    parser.add_argument("--steps", type=int, default=3, help="steps per process")
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    measure.measure_rows(_ROWS, args.rows, args, args.json)


if __name__ == "__main__":
    measure.run_command(main)
