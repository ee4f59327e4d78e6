"""Checks and times the train step on the GPU of this machine: `… benchmarks.on_gpu --json F`.

For the few minutes for which a GPU is borrowed: parts in the order of their worth, each in its own
processes and with its own time limit; the file has the rows so far after each. Batches are noise.
It needs the sources, JAX for this GPU, flax, optax and some small packages
(docs/performance_measuring.md); PyTorch's row needs torch and torchvision. `--small` runs all
in small on any machine.
"""

from __future__ import annotations

import collections
import functools
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import ChildError, Measured, RowTable, SkipError, Target

# Dense, without sparsity, in FLOP/s: NVIDIA's data sheets of H200 and H100 SXM (989.4 TFLOP/s) and
# A100 (312 TFLOP/s).
_BFLOAT16_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED", re.IGNORECASE)
_STEPS_OF_PROFILE, _KERNELS = 3, 10
# Settings that make a step small for --small.
_SMALL = {
    "views.num_frames": "4",
    "crop.image_size": "16",
    "model.video.name": "'resnet'",
    "model.video.resnet.widths": "(8, 12)",
    "model.video.resnet.depths": "(0, 1)",
    "model.audio.name": "'resnet'",
    "model.audio.resnet.widths": "(8, 12)",
    "model.audio.resnet.depths": "(0, 1)",
    "bank.size": "1024",
    "bank.num_negatives": "64",
    "bank.negative_candidates": "128",
}


class Run:
    """Parts that have been measured, and the time that is left to the next ones.

    Attributes:
        small: small sizes, on the default device of JAX.
        gpu: name of the GPU, or of what takes its place.
        overrides: settings that make the step of a preset small.
    """

    def __init__(self, *, seconds: float, small: bool, gpu: str):
        self.small, self.gpu = small, gpu
        self.overrides = _SMALL if small else {}
        self._seconds, self._began = seconds, time.monotonic()
        self._ends = self._began
        self._found: dict[str, Mapping[str, Measured] | SkipError] = {}

    def child(self, target: str, **arguments: Any) -> Any:
        """Calls a function in a process that ends when the part does."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise ChildError("its part of the time was over")
        return measure.run_child(target, arguments, limit_s=left)

    def row(self, part: str, name: str) -> Measured:
        """A row of a part, which is measured when its first row is needed.

        Raises:
            SkipError: if the part failed, or its time was over.
        """
        if part not in self._found:
            shares = [share for share, _ in _PARTS.values()]
            until = sum(shares[: list(_PARTS).index(part) + 1]) / sum(shares)
            self._ends = self._began + self._seconds * until
            try:
                self._found[part] = _PARTS[part][1](self)
            except (ChildError, SkipError) as error:
                self._found[part] = SkipError(str(error))
        found = self._found[part]
        if isinstance(found, SkipError):
            raise found
        if name not in found:
            raise SkipError("the device does not tell how much memory it used")
        return found[name]

    def peak_share(self, flops: float, seconds: float) -> float:
        """Operations per second over the bfloat16 peak of the matrix units.

        Raises:
            SkipError: if the peak is unknown.
        """
        peaks = [peak for gpu, peak in _BFLOAT16_PEAKS.items() if gpu in self.gpu]
        if not peaks and not self.small:
            raise SkipError(f"the published peak of {self.gpu} is unknown: add it to {__file__}")
        return flops / seconds / (peaks[0] if peaks else 1e12)


def agreement(*, overrides: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Compares one step on the default device and on the CPU with float32 on the CPU.

    The step is the demo's, with its bank in use, by SGD, whose update is the gradient.

    Returns:
        By device and dtype: `loss`, largest relative error of a term of the loss, and `gradient`,
        relative error of the gradient of all parameters.
    """
    import jax
    import numpy as np

    from benchmarks import steps
    from benchmarks.aot import config_of

    def taken(device: jax.Device, dtype: str, host: Any = None) -> tuple[Any, Any, Any]:
        config = config_of("demo", overrides)
        config.update_from_flattened_dict(
            {
                "model.dtype": dtype,
                "optimizer.name": "sgd",
                "optimizer.weight_decay": 0.0,
                "optimizer.clip_norm": 0.0,
                "optimizer.ema_decay": 0.0,
                "optimizer.learning_rate": 1.0,
                "optimizer.warmup_steps": 0,  # its own count begins at 0
            }
        )
        step, state, batch, key = steps.demo_training(config, device)
        if host is not None:  # drawn on another device, parameters could be rounded otherwise
            state = jax.tree.map(lambda new, old: jax.device_put(old, new.sharding), state, host)
        host = jax.tree.map(np.array, state)  # copies, because the step takes the state
        state, metrics = step(state, batch, key)
        steps.check_bank_in_use(config, metrics)
        gradient = jax.tree.map(np.subtract, jax.device_get(state.params), host.params)
        losses = {
            name: float(value.compute())
            for name, value in metrics.items()
            if name.endswith("loss") and np.isfinite(float(value.compute()))
        }
        return host, losses, np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])

    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    host, losses, gradient = taken(cpu, "float32")
    errors = {}
    for name, where, dtype in (
        ("cpu_bfloat16", cpu, "bfloat16"),
        ("gpu_bfloat16", device, "bfloat16"),
        ("gpu_float32", device, "float32"),
    ):
        _, found, other = taken(where, dtype, host)
        errors[name] = {
            "loss": max(abs(found[term] / losses[term] - 1) for term in losses if losses[term]),
            "gradient": float(np.linalg.norm(other - gradient) / np.linalg.norm(gradient)),
        }
    return errors


def _agreement(run: Run) -> dict[str, Measured]:
    errors = run.child("benchmarks.on_gpu:agreement", overrides=run.overrides)
    return {
        f"gpu_{what}_error_ratio": (
            errors["gpu_bfloat16"][what] / errors["cpu_bfloat16"][what],
            {name: error[what] for name, error in errors.items()},
        )
        for what in ("loss", "gradient")
    }


def _pytorch(run: Run) -> dict[str, Measured]:
    """R(2+1)D-18 in bfloat16, at the largest batch that fits ours and PyTorch's."""
    if run.small:
        raise SkipError("PyTorch is compared on a GPU alone")
    measure.need("torch")
    measure.need("torchvision")
    ours = "benchmarks.steps:seconds_of_encoder_steps"
    theirs = functools.partial(
        run.child, "benchmarks.baselines.pytorch_encoder:seconds_of_steps", device="cuda"
    )
    # The slowest to start is last, as time may be over before it ends.
    sides: dict[str, Callable[..., list[float]]] = {
        "ours": functools.partial(run.child, ours),
        "eager": functools.partial(theirs, compiled=False),
        "compiled": functools.partial(theirs, compiled=True),
    }
    batch, seconds = 256, dict[str, list[float]]()
    while len(seconds) < len(sides):  # the batch is halved until it fits all
        name = list(sides)[len(seconds)]
        try:
            seconds[name] = sides[name](batch=batch, steps=20, dtype="bfloat16")
        except ChildError as error:
            if _OUT_OF_MEMORY.search(str(error)) and batch > 1:
                batch, seconds = batch // 2, {}
            elif name == "compiled":
                break
            else:
                raise
    theirs_best = min(list(seconds)[1:], key=lambda name: statistics.median(seconds[name]))
    ratio, detail = measure.ratio(seconds, theirs_best, "ours", quantity="seconds")
    return {"step_over_pytorch_gpu": (ratio, {"batch": batch, "better": theirs_best, **detail})}


def whole_step(
    *, preset: str, overrides: Mapping[str, str], videos: int, steps: int
) -> dict[str, Any]:
    """Compiles, times and profiles the whole step of a preset on one device.

    Args:
        videos: videos of a batch, two clips each.
        steps: timed steps.

    Returns:
        `seconds` of each step, `model_flops`, `compile_seconds`, `estimated_bytes` of the compiled
        program, `peak_bytes` in use (None where the device does not tell), and `kernels`, name and
        milliseconds a step of the longest, with `kernel_ms`, those of all.
    """
    import jax

    from avcl_jax.training import program, sharding
    from avcl_jax.training.step import jit_train_step
    from benchmarks.aot import config_of, step_flops
    from benchmarks.batches import random_batch

    config = config_of(preset, overrides)
    with config.unlocked():
        config.global_batch_size = videos
    mesh, init, function = program.build(config, jax.devices()[:1])
    key = jax.random.key(0)
    state, shardings = init(key)
    batch = jax.device_put(random_batch(config), sharding.rows_sharding(mesh))
    lowered = jit_train_step(function, mesh, shardings).lower(state, batch, key)
    compile_seconds = time.perf_counter()
    step = lowered.compile()
    compile_seconds = time.perf_counter() - compile_seconds

    def next_step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch, key))

    seconds = measure.seconds_of_each(next_step, steps, warmup=3)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(_STEPS_OF_PROFILE):
                next_step()
        kernels = kernel_seconds(Path(directory))
    memory: Any = step.memory_analysis()
    parts = {
        kind: getattr(memory, f"{kind}_size_in_bytes")
        for kind in ("argument", "output", "temp", "generated_code", "alias")
    }
    return {
        "device": jax.devices()[0].device_kind,
        "videos": videos,
        "seconds": seconds,
        "model_flops": videos * step_flops(config),
        "compile_seconds": round(compile_seconds, 1),
        "estimated_bytes": sum(parts.values()) - 2 * parts["alias"],
        "peak_bytes": peak,
        "kernel_ms": 1e3 * sum(kernels.values()) / _STEPS_OF_PROFILE,
        "kernels": [
            (name, round(1e3 * spent / _STEPS_OF_PROFILE, 3))
            for name, spent in kernels.most_common(_KERNELS)
        ],
    }


def kernel_seconds(directory: Path) -> collections.Counter[str]:
    """Seconds of each kernel in a profile of JAX: in streams of a GPU, else in threads of XLA."""
    (path,) = directory.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    streams = {thread for thread, name in threads.items() if name.startswith("Stream")}
    streams = streams or {thread for thread, name in threads.items() if "XLA" in name}
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            spent[event["name"]] += event["dur"] / 1e6
    return spent


def _whole_step(run: Run) -> dict[str, Measured]:
    found = run.child(
        "benchmarks.on_gpu:whole_step",
        preset="kinetics400",
        overrides=run.overrides,
        videos=8 if run.small else 64,
        steps=3 if run.small else 15,
    )
    seconds = statistics.median(found["seconds"])
    top = sum(spent for _, spent in found["kernels"])
    rows = {
        "gpu_step_peak_share": (
            run.peak_share(found["model_flops"], seconds),
            {"gpu": run.gpu, **found},
        ),
        "gpu_step_top_kernels_share": (top / found["kernel_ms"], {"kernels": found["kernels"]}),
    }
    if found["peak_bytes"]:
        value = found["peak_bytes"] / found["estimated_bytes"]
        rows["gpu_step_memory_over_estimate"] = value, {}
    return rows


def _lowerings(run: Run) -> dict[str, Measured]:
    """Both forms of the convolutions, in R(2+1)D-18 in bfloat16."""
    batch = 1 if run.small else 64
    flops = batch * run.child("benchmarks.steps:encoder_flops", small=run.small)
    rows = {}
    for lowering in ("folded", "direct"):
        seconds = run.child(
            "benchmarks.steps:seconds_of_encoder_steps",
            batch=batch,
            steps=1 if run.small else 15,
            dtype="bfloat16",
            lowering=lowering,
            small=run.small,
        )
        share = run.peak_share(flops, statistics.median(seconds))
        detail = {
            "gpu": run.gpu,
            "batch": batch,
            "model_flops": flops,
            "seconds": measure.spread(seconds),
        }
        rows[f"gpu_peak_share_{lowering}"] = share, detail
    return rows


def demo(*, steps: int, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Trains the demo's model on one batch of noise with its bank in use.

    Returns:
        `seconds` of all steps after the first few, and averages of all `metrics` over the `first`
        and the `last` tenth of the steps.
    """
    import jax

    from avcl_jax.training.averages import merge_metrics
    from benchmarks.aot import config_of
    from benchmarks.steps import WARM_UP_STEPS, check_bank_in_use, demo_training

    config = config_of("demo", overrides)
    step, state, batch, key = demo_training(config)
    merge, tenth = jax.jit(merge_metrics), max(steps // 10, 1)
    periods: list[Any] = []
    for number in range(steps):
        if number == WARM_UP_STEPS:
            began = time.perf_counter()
        state, metrics = step(state, batch, key)
        new = number % tenth == 0
        periods.append(metrics) if new else periods.append(merge(periods.pop(), metrics))
    check_bank_in_use(config, jax.block_until_ready(metrics))
    seconds = time.perf_counter() - began

    def averages(period: Any) -> dict[str, float]:
        return {name: round(float(value.compute()), 4) for name, value in period.items()}

    return {
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "steps_per_second": (steps - WARM_UP_STEPS) / seconds,
        "metrics": {"first": averages(periods[0]), "last": averages(periods[-1])},
    }


def _demo(run: Run) -> dict[str, Measured]:
    found = run.child(
        "benchmarks.on_gpu:demo", steps=20 if run.small else 200, overrides=run.overrides
    )
    first, last = (found["metrics"][period]["loss"] for period in ("first", "last"))
    return {
        "gpu_demo_steps_per_second": (found["steps_per_second"], found),
        "gpu_demo_loss_last_over_first": (last / first, {"first": first, "last": last}),
    }


def _remat(run: Run) -> dict[str, Measured]:
    """As `benchmarks.remat` measures it, where the backward pass is delayed."""
    results = run.child(
        "benchmarks.remat:compare",
        remats=("none", "blocks"),
        batch=1 if run.small else 64,
        dtype="bfloat16",
        repeats=1 if run.small else 5,
        small=run.small,
    )
    memory = {name: [result["temporary_bytes"] / 2**20] for name, result in results.items()}
    seconds = {name: result["seconds"] for name, result in results.items()}
    return {
        "gpu_remat_memory_ratio": measure.ratio(memory, "blocks", "none", quantity="temporary_mib"),
        "gpu_remat_time_ratio": measure.ratio(seconds, "blocks", "none", quantity="seconds"),
    }


# In the order of their worth: share of the time, and the function that measures the rows.
_PARTS: dict[str, tuple[float, Callable[[Run], dict[str, Measured]]]] = {
    "agreement": (0.2, _agreement),
    "pytorch": (0.22, _pytorch),
    "whole step": (0.23, _whole_step),
    "lowerings": (0.15, _lowerings),
    "demo": (0.08, _demo),
    "remat": (0.12, _remat),
}


def _rows(part: str, rows: Sequence[tuple[str, str, Target | None]]) -> RowTable[Run]:
    def row(name: str) -> Callable[[Run], Measured]:
        return lambda run: run.row(part, name)

    return {name: (unit, target, row(name)) for name, unit, target in rows}


_ROWS: RowTable[Run] = {
    **_rows(
        "agreement",
        [
            # Over the error of a CPU in the same dtype, which rounds as often.
            ("gpu_gradient_error_ratio", "ratio", Target("<=", 1.5)),
            ("gpu_loss_error_ratio", "ratio", Target("<=", 1.5)),
        ],
    ),
    **_rows("pytorch", [("step_over_pytorch_gpu", "ratio", Target(">=", 1.1))]),
    **_rows(
        "whole step",
        [
            ("gpu_step_peak_share", "fraction", Target(">=", 0.25)),
            ("gpu_step_memory_over_estimate", "ratio", Target("<=", 1.1)),
            ("gpu_step_top_kernels_share", "fraction", None),
        ],
    ),
    **_rows(
        "lowerings",
        [(f"gpu_peak_share_{lowering}", "fraction", None) for lowering in ("folded", "direct")],
    ),
    **_rows(
        "demo",
        [
            ("gpu_demo_steps_per_second", "steps/s", None),
            ("gpu_demo_loss_last_over_first", "ratio", Target("<=", 0.95)),
        ],
    ),
    **_rows(
        "remat",
        [
            ("gpu_remat_memory_ratio", "ratio", Target("<=", 0.5)),
            ("gpu_remat_time_ratio", "ratio", Target("<=", 1.35)),
        ],
    ),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("on_gpu", __doc__, rows=_ROWS)
    parser.add_argument("--minutes", type=float, default=8, help="limit of all parts (%(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="small sizes, on any machine, to try the command"
    )
    args = parser.parse_args(arguments)
    gpu = measure.gpu_name()
    if gpu == "none" and not args.small:
        parser.error("nvidia-smi lists no GPU; --small runs all in small on this machine")
    run = Run(seconds=60 * args.minutes, small=args.small, gpu=gpu)
    measure.measure_rows(_ROWS, args.rows, run, args.json)


if __name__ == "__main__":
    measure.run_command(main)
