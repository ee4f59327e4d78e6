"""How fast a training step is: `python -m benchmarks.train_step --json F`.

Every row is described in docs/performance.md. What is compared runs in turns in fresh processes
with the same threads and the same allocator; what belongs to one step of ours is compared inside
one process. A row that cannot be measured here is listed as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Target,
    interleave,
    measure_row,
    median_ratio,
    need,
    print_table,
    run_child,
    spread,
    write_json,
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
CLIP = (16, 112, 112, 3)
# Of the demo, not counted: compilation, and memory that is not there yet.
WARM_UP_STEPS = 5


def seconds_of_encoder_steps(*, batch: int, steps: int) -> list[float]:
    """Seconds of each step of our R(2+1)D-18: forward, backward and AdamW, after one uncounted."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from avcl_jax.models.encoders import create_encoder

    encoder = create_encoder("video", "r2plus1d_18", {"subtract_time_mean": False})
    clips = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *CLIP)), jnp.float32)
    variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), clips)
    optimizer = optax.adamw(1e-4)

    def step(state: Any, clips: Any) -> tuple[Any, Any]:
        params, statistics, moments = state

        def loss(params: Any) -> tuple[Any, Any]:
            outputs, updated = encoder.apply(
                {"params": params, "batch_stats": statistics},
                clips,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.square(outputs["features"]).mean(), updated["batch_stats"]

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), value

    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    compiled = jax.jit(step, donate_argnums=0)
    seconds = []
    for _ in range(1 + steps):
        begin = time.perf_counter()
        state, value = compiled(state, clips)
        jax.block_until_ready((state, value))
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def seconds_of_demo_steps(*, steps: int) -> list[float]:
    """Seconds of each step of the demo as it is trained, with its bank in use.

    Args:
        steps: how many; as many as the PyTorch step makes before it are not counted.
    """
    import dataclasses

    import jax
    import numpy as np

    from avcl_jax.training import loop, sharding
    from avcl_jax.training.step import jit_train_step
    from benchmarks.batches import random_batch
    from configs import pretrain

    config = pretrain.get_config("demo")
    mesh, init, step_function = loop.build(config)
    key = jax.random.key(0)
    state, shardings = init(key)
    # Full, of other videos, and past its warm-up: its rows are drawn from the first step on.
    size, rng = config.bank.size, np.random.default_rng(1)
    rows = rng.normal(size=(2, size, config.model.embedding_dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    empty: Any = state.bank
    bank = dataclasses.replace(
        empty,
        video=rows[0],
        audio=rows[1],
        source_id=config.global_batch_size + np.arange(size, dtype=np.int32) // 2,
        has_video=np.ones(size, bool),
        has_audio=np.ones(size, bool),
        insertion=np.arange(size, dtype=np.int32),
        inserted=np.int32(size),
    )
    step_number = np.int32(config.bank.warmup_steps)
    state = jax.device_put(dataclasses.replace(state, bank=bank, step=step_number), shardings)
    step = jit_train_step(step_function, mesh, shardings)
    batch = jax.device_put(random_batch(config), sharding.rows_sharding(mesh))
    seconds = []
    for _ in range(WARM_UP_STEPS + steps):
        begin = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    used = float(metrics["vv/bank_positives"].compute())
    if used != config.bank.num_positives:
        raise RuntimeError(f"anchors got {used} bank positives: the bank was not in use")
    return seconds[WARM_UP_STEPS:]


def seconds_of_demo_parts(*, repeats: int) -> dict[str, list[float]]:
    """Seconds of the demo's step and of parts of it, each compiled by itself, in turns.

    Returns:
        `step`, the whole; `encoders`, forward and backward of both; `inputs`, the augmentation and
        what else makes inputs of a batch.
    """
    import jax
    import jax.numpy as jnp

    from avcl_jax import experiment
    from avcl_jax.training import loop, sharding
    from avcl_jax.training.step import prepare_inputs
    from benchmarks.batches import random_batch
    from configs import pretrain

    config = pretrain.get_config("demo")
    mesh, init, step_function = loop.build(config)
    key = jax.random.key(0)
    state, shardings = init(key)
    spec = experiment.render_spec(config)
    mel = spec.log_mel
    batch = random_batch(config)
    whole = sharding.replicated(mesh)
    step = jax.jit(step_function, in_shardings=(shardings, sharding.rows_sharding(mesh), whole))
    prepare = jax.jit(
        functools.partial(
            prepare_inputs,
            spec=spec,
            pixel_mean=config.pixels.mean,
            pixel_std=config.pixels.std,
            augmentation=(experiment.photometric_spec(config), experiment.spectral_spec(config)),
            key=key,
        )
    )
    inputs = jax.block_until_ready(prepare(batch))
    networks = {
        "video": experiment.video_encoder(config),
        "audio": experiment.audio_encoder(config),
    }
    arrays = {
        "video": inputs["video"].reshape(-1, *spec.video_shape),
        "audio": inputs["spectrogram"].reshape(-1, mel.frames, mel.mels),
    }

    def encode(variables: Any, arrays: Any) -> Any:
        def loss(params: Any) -> Any:
            total = jnp.zeros(())
            for name, network in networks.items():
                outputs, _ = network.apply(
                    variables[name] | {"params": params[name]},
                    arrays[name],
                    train=True,
                    mutable=["batch_stats"],
                )
                total += jnp.square(outputs["features"]).mean()
            return total

        return jax.grad(loss)({name: variables[name]["params"] for name in networks})

    variables = {
        name: {
            "params": state.params[f"{name}_encoder"],
            "batch_stats": state.batch_stats[f"{name}_encoder"],
        }
        for name in networks
    }
    encode_compiled = jax.jit(encode)
    batch = jax.device_put(batch, sharding.rows_sharding(mesh))
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: step(state, batch, key),
        "encoders": lambda: encode_compiled(variables, arrays),
        "inputs": lambda: prepare(batch),
    }

    def timed(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - begin

    measurements = {name: functools.partial(timed, call) for name, call in calls.items()}
    interleave(measurements, repeats=2)  # compilation, and memory that is not there yet
    return interleave(measurements, repeats=repeats)


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
        "benchmarks.train_step:seconds_of_encoder_steps",
        "benchmarks.baselines.pytorch_encoder:seconds_of_steps",
        {"batch": args.batch, "steps": args.steps},
        repeats=args.repeats,
    )


def demo_step_over_pytorch(args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Steps a second of the demo's whole step over those of the same in PyTorch."""
    return over_pytorch(
        "benchmarks.train_step:seconds_of_demo_steps",
        "benchmarks.baselines.pytorch_pretraining:seconds_of_steps",
        {"steps": 5 * args.steps},  # These are short.
        repeats=args.repeats,
    )


def demo_part(above: str, below: str, *, repeats: int) -> tuple[float, dict[str, Any]]:
    """Seconds of one part of the demo's step over those of another."""
    parts = _demo_parts(repeats)
    detail = {f"seconds_{name}": spread(parts[name]) for name in (above, below)}
    return median_ratio(parts[above], parts[below]), detail


@functools.cache
def _demo_parts(repeats: int) -> Mapping[str, list[float]]:
    # These are short.
    return run_child("benchmarks.train_step:seconds_of_demo_parts", {"repeats": 4 * repeats})


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
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=2, help="clips of an encoder step")
    parser.add_argument("--steps", type=int, default=3, help="steps of each process")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    rows = []
    for name in args.rows:
        target, measure = _ROWS[name]
        rows.append(measure_row(name, "ratio", target, functools.partial(measure, args)))
        # After each row: a long run that is stopped keeps what it has.
        write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
