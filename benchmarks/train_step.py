"""Speed of a training step: `python -m benchmarks.train_step --json F`.

docs/performance.md describes the rows. The sides of a comparison run in turns in fresh processes
with the same threads and the same allocator; parts of our step are compared inside one process. A
row that cannot be measured on this machine is listed as skipped, with the reason.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import measure
from benchmarks.measure import ChildError, Measured, RowTable, SkipError, Target

# For both sides alike: glibc keeps freed memory and maps it in pages of 2 MB. By default it maps
# the memory of each step again, and the kernel clears half a million small pages.
_MALLOC = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 10**12, "top_pad": 10**6}
ALLOCATOR = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
# Dense, without sparsity, in FLOP/s: NVIDIA's data sheets of H200 and H100 SXM (989.4 TFLOP/s) and
# A100 (312 TFLOP/s).
_BFLOAT16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_ENCODER = "benchmarks.steps:seconds_of_encoder_steps"
_PYTORCH_ENCODER = "benchmarks.baselines.pytorch_encoder:seconds_of_steps"


def _sides(
    ours: str,
    baseline: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    **torch: str,
) -> dict[str, Callable[[], float]]:
    """Measurements of our step and of PyTorch's: median seconds of the steps of one process.

    Args:
        ours: "package.module:function" that returns the seconds of each step.
        baseline: the same for PyTorch, with the additional argument `compiled`.
        arguments: arguments of both.
        environment: environment variables of both.
        torch: further arguments of the baseline.
    """

    def median(target: str, **further: Any) -> float:
        seconds = measure.run_child(target, {**arguments, **further}, environment=environment)
        return statistics.median(seconds)

    return {
        "ours": functools.partial(median, ours),
        "eager": functools.partial(median, baseline, compiled=False, **torch),
        "compiled": functools.partial(median, baseline, compiled=True, **torch),
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


def gpu_steps(args: Namespace) -> tuple[str, int, Mapping[str, list[float]]]:
    """Measures bfloat16 steps of ours and of PyTorch's on a GPU, at the same batch.

    Returns:
        Name of the GPU, batch, and the median seconds of each process for `ours`, `eager` and
        `compiled`.

    Raises:
        SkipError: without a GPU that both libraries can use.
    """
    name = measure.gpu_name()
    if name == "none":
        raise SkipError("nvidia-smi lists no GPU")
    measure.need("torch")
    measure.need("torchvision")
    usable = measure.run_child("benchmarks.steps:gpu_usable", {})
    if without := [library for library in usable if not usable[library]]:
        raise SkipError(f"{' and '.join(without)} cannot use {name}: install their builds for CUDA")
    return name, *_gpu_steps(args.gpu_batch, args.steps, args.repeats)


@functools.cache
def _gpu_steps(batch: int, steps: int, repeats: int) -> tuple[int, Mapping[str, list[float]]]:
    gpu = {"JAX_PLATFORMS": "cuda"}
    while True:  # until the batch, halved each time, fits both
        arguments = {"steps": 5 * steps, "dtype": "bfloat16", "batch": batch}
        sides = _sides(_ENCODER, _PYTORCH_ENCODER, arguments, gpu, device="cuda")
        try:
            for side in sides.values():
                side()
        except ChildError as error:
            memory = re.search(r"out of memory|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE)
            if batch == 1 or not memory:
                raise
            batch //= 2
        else:
            return batch, measure.interleave(sides, repeats=repeats)


def step_over_pytorch_gpu(args: Namespace) -> Measured:
    """Clips per second of our encoder step over those of the better of PyTorch's, on a GPU."""
    name, batch, seconds = gpu_steps(args)
    value, detail = _over_better(seconds)
    return value, {"gpu": name, "batch": batch, **detail}


def gpu_peak_fraction(args: Namespace) -> Measured:
    """Model FLOP/s of that step over the bfloat16 peak of the GPU's matrix units."""
    name, batch, seconds = gpu_steps(args)
    peaks = [peak for gpu, peak in _BFLOAT16_PEAKS.items() if gpu in name]
    if not peaks:
        raise SkipError(f"the published peak of {name} is unknown: add it to {__file__}")
    flops = batch * measure.run_child("benchmarks.steps:encoder_flops", {})
    return flops / statistics.median(seconds["ours"]) / peaks[0], {
        "gpu": name,
        "batch": batch,
        "model_flops": flops,
        "seconds": measure.spread(seconds["ours"]),
    }


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
    "step_over_pytorch_gpu": ("ratio", Target(">=", 1.1), step_over_pytorch_gpu),
    "gpu_peak_fraction": ("fraction", Target(">=", 0.25), gpu_peak_fraction),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("train_step", __doc__, rows=_ROWS, repeats=True)
    parser.add_argument("--batch", type=int, default=2, help="clips per encoder step")
    parser.add_argument(
        "--gpu-batch", type=int, default=512, help="largest number of clips per step on a GPU"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps per process")
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    measure.measure_rows(_ROWS, args.rows, args, args.json)


if __name__ == "__main__":
    measure.run_command(main)
