"""How fast a training step is: `python -m benchmarks.train_step --json F`.

Every row is described in docs/performance.md. What is compared runs in turns in fresh processes
with the same threads and the same allocator; what belongs to one step of ours is compared inside
one process. A row that cannot be measured here is listed as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.measure import (
    ChildError,
    SkipError,
    Target,
    gpu_name,
    interleave,
    measure_rows,
    median_ratio,
    need,
    run_child,
    run_command,
    spread,
    writable_path,
)

# For both sides alike: glibc keeps freed memory and takes it in pages of 2 MB. By default it maps a
# step's memory anew each time, and the kernel clears half a million small pages.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_max": 0,
        "trim_threshold": 10**12,
        "top_pad": 10**6,
    }.items()
)
# Dense, without sparsity, in FLOP/s: NVIDIA's data sheets of H200 and H100 SXM (989.4 TFLOP/s) and
# A100 (312 TFLOP/s).
_BFLOAT16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def over_pytorch(
    ours: str, baseline: str, sizes: Mapping[str, int], *, repeats: int
) -> tuple[float, dict[str, Any]]:
    """Speed of our step over that of the better of PyTorch's, eager and compiled.

    Args:
        ours: function that returns the seconds of each step, "package.module:function".
        baseline: the same of PyTorch's, which takes `compiled` besides.
        sizes: arguments of both.
        repeats: processes of each.
    """
    need("torch")

    def median(target: str, **arguments: Any) -> float:
        return statistics.median(run_child(target, {**sizes, **arguments}))

    seconds = interleave(
        {
            "ours": lambda: median(ours),
            "eager": lambda: median(baseline, compiled=False),
            "compiled": lambda: median(baseline, compiled=True),
        },
        repeats=repeats,
    )
    best = min(("eager", "compiled"), key=lambda name: statistics.median(seconds[name]))
    detail = {f"seconds_{name}": spread(values) for name, values in seconds.items()}
    return median_ratio(seconds[best], seconds["ours"]), {**sizes, "better": best, **detail}


def step_over_pytorch(args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Clips a second of our encoder step over those of PyTorch's."""
    need("torchvision")
    return over_pytorch(
        "benchmarks.steps:seconds_of_encoder_steps",
        "benchmarks.baselines.pytorch_encoder:seconds_of_steps",
        {"batch": args.batch, "steps": args.steps},
        repeats=args.repeats,
    )


def demo_step_over_pytorch(args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Steps a second of the demo's whole step over those of the same in PyTorch."""
    return over_pytorch(
        "benchmarks.steps:seconds_of_demo_steps",
        "benchmarks.baselines.pytorch_pretraining:seconds_of_steps",
        {"steps": 5 * args.steps},  # These are short.
        repeats=args.repeats,
    )


def gpu_steps(args: argparse.Namespace) -> tuple[Mapping[str, list[float]], dict[str, Any]]:
    """Seconds of bfloat16 steps of ours and of PyTorch's on a GPU, at the same batch.

    Returns:
        Median of each process for `ours`, `eager` and `compiled`, and what was measured.

    Raises:
        SkipError: without a GPU that both libraries see.
    """
    name = gpu_name()
    if name == "none":
        raise SkipError("nvidia-smi lists no GPU")
    need("torch")
    need("torchvision")
    blind = [
        library for library, sees in run_child("benchmarks.steps:gpu_seen", {}).items() if not sees
    ]
    if blind:
        raise SkipError(f"{' and '.join(blind)} cannot use {name}: install their builds for CUDA")
    return _gpu_steps(args.gpu_batch, args.steps, args.repeats), {"gpu": name}


@functools.cache
def _gpu_steps(batch: int, steps: int, repeats: int) -> Mapping[str, list[float]]:
    sizes = {"steps": 5 * steps, "dtype": "bfloat16"}
    environment = {"JAX_PLATFORMS": "cuda"}
    baseline = "benchmarks.baselines.pytorch_encoder:seconds_of_steps"

    def median(target: str, batch: int, **arguments: Any) -> float:
        arguments |= sizes | {"batch": batch}
        return statistics.median(run_child(target, arguments, environment=environment))

    sides = {
        "ours": functools.partial(median, "benchmarks.steps:seconds_of_encoder_steps"),
        "eager": functools.partial(median, baseline, compiled=False, device="cuda"),
        "compiled": functools.partial(median, baseline, compiled=True, device="cuda"),
    }
    # As large as fits both: halved until it does.
    while batch > 1:
        try:
            for side in sides.values():
                side(batch)
        except ChildError as error:
            if not re.search(r"out of memory|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE):
                raise
            batch //= 2
        else:
            break
    found = interleave(
        {name: functools.partial(side, batch) for name, side in sides.items()}, repeats=repeats
    )
    return {**found, "batch": [float(batch)]}


def step_over_pytorch_gpu(args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Clips a second of our encoder step over those of the better of PyTorch's, on a GPU."""
    seconds, detail = gpu_steps(args)
    best = min(("eager", "compiled"), key=lambda name: statistics.median(seconds[name]))
    detail |= {f"seconds_{name}": spread(seconds[name]) for name in ("ours", "eager", "compiled")}
    detail |= {"batch": int(seconds["batch"][0]), "better": best}
    return median_ratio(seconds[best], seconds["ours"]), detail


def gpu_peak_share(args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Model FLOP/s of that step over the peak of the GPU's matrix units in bfloat16."""
    seconds, detail = gpu_steps(args)
    peaks = [peak for name, peak in _BFLOAT16_PEAKS.items() if name in detail["gpu"]]
    if not peaks:
        raise SkipError(
            f"no published peak is known here for {detail['gpu']}: add it to {__file__}"
        )
    batch = int(seconds["batch"][0])
    flops = batch * run_child("benchmarks.steps:encoder_flops", {})
    detail |= {"batch": batch, "model_flops": flops, "seconds": spread(seconds["ours"])}
    return flops / statistics.median(seconds["ours"]) / peaks[0], detail


def demo_part(above: str, below: str, *, repeats: int) -> tuple[float, dict[str, Any]]:
    """Seconds of one part of the demo's step over those of another."""
    parts = _demo_parts(repeats)
    detail = {f"seconds_{name}": spread(parts[name]) for name in (above, below)}
    return median_ratio(parts[above], parts[below]), detail


@functools.cache
def _demo_parts(repeats: int) -> Mapping[str, list[float]]:
    # These are short.
    return run_child("benchmarks.steps:seconds_of_demo_parts", {"repeats": 4 * repeats})


_ROWS: dict[str, tuple[Target, Callable[[Any], tuple[float, dict[str, Any]]]]] = {
    "step_over_pytorch_cpu": (Target(">=", 0.8), step_over_pytorch),
    "demo_step_over_pytorch_cpu": (Target(">=", 1.2), demo_step_over_pytorch),
    "step_over_encoders": (
        Target("<=", 1.08),
        lambda args: demo_part("step", "encoders", repeats=args.repeats),
    ),
    "device_augment_share": (
        Target("<=", 0.05),
        lambda args: demo_part("inputs", "step", repeats=args.repeats),
    ),
    "step_over_pytorch_gpu": (Target(">=", 1.1), step_over_pytorch_gpu),
    "gpu_peak_share": (Target(">=", 0.25), gpu_peak_share),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=2, help="clips of an encoder step")
    parser.add_argument(
        "--gpu-batch", type=int, default=512, help="clips of a step on a GPU to try first"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of each process")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    measure_rows({name: ("ratio", *row) for name, row in _ROWS.items()}, args.rows, args, args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
