"""What computing blocks again in the backward pass saves in memory, and takes in time.

    python -m benchmarks.remat --json remat.json

R(2+1)D-18 on clips of 16 x 112 x 112, forward and backward, with rematerialisation over without.
Meant for an accelerator: XLA's CPU compiler drops the barriers that put off what is computed again,
and then saves nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import (
    Row,
    Target,
    interleave,
    median_ratio,
    print_table,
    run_child,
    run_command,
    spread,
    writable_path,
    write_json,
)

ENCODER = "r2plus1d_18"
CLIP = (16, 112, 112, 3)


def compare(*, remats: Sequence[str], batch: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Compiles and times the step of each kind of rematerialisation, in turns.

    Args:
        remats: settings of `execution.remat`.
        batch: clips of a step.
        dtype: of the computation.
        repeats: steps timed of each; 0 compiles only.

    Returns:
        By setting: `temporary_bytes` of the compiled step, `flops` and `seconds` of every step.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from avcl_jax.models.encoders import create_encoder

    encoders = {
        remat: create_encoder(
            "video",
            ENCODER,
            {"subtract_time_mean": False, "remat": remat, "dtype": jnp.dtype(dtype)},
        )
        for remat in remats
    }
    video = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *CLIP)), jnp.float32)
    some = next(iter(encoders.values()))
    shapes = jax.eval_shape(functools.partial(some.init, train=False), jax.random.key(0), video)
    # Any numbers do, and compiling the initialisation takes longer than the measurement.
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02), shapes)

    def step(encoder: Any, variables: Any, video: Any) -> Any:
        def loss(params: Any) -> tuple[Any, Any]:
            everything = variables | {"params": params}
            outputs, statistics = encoder.apply(
                everything, video, train=True, mutable=["batch_stats"]
            )
            return jnp.square(outputs["features"]).sum(), statistics

        return jax.grad(loss, has_aux=True)(variables["params"])

    steps, found = {}, {}
    for remat, encoder in encoders.items():
        begin = time.perf_counter()
        compiled = jax.jit(functools.partial(step, encoder)).lower(variables, video).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None
        assert cost is not None
        found[remat] = {
            "temporary_bytes": memory.temp_size_in_bytes,
            "flops": cost.get("flops"),
            "device": jax.devices()[0].device_kind,
            "compile_seconds": round(time.perf_counter() - begin, 1),
        }
        print(remat, found[remat], file=sys.stderr, flush=True)

        def run(compiled: Any = compiled) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(variables, video))
            return time.perf_counter() - begin

        steps[remat] = run
    if repeats:
        interleave(steps, repeats=1)  # the first run of each is not timed
        for remat, seconds in interleave(steps, repeats=repeats).items():
            found[remat]["seconds"] = seconds
    return found


def measure_rows(remat: str, *, batch: int, dtype: str, repeats: int) -> list[Row]:
    """Measures `remat_memory_ratio` and `remat_time_ratio` of a setting, all in one process."""
    remats = ("none", "norms", "blocks")
    found = run_child(
        "benchmarks.remat:compare",
        {"remats": remats, "batch": batch, "dtype": dtype, "repeats": repeats},
    )
    without, chosen = found["none"], found[remat]
    shape = {"remat": remat, "encoder": ENCODER, "clip": CLIP, "batch": batch, "dtype": dtype}
    shape["device"] = without["device"]
    memory = {name: round(value["temporary_bytes"] / 2**20, 1) for name, value in found.items()}
    seconds = {name: spread(value["seconds"]) for name, value in found.items()}
    return [
        Row(
            "remat_memory_ratio",
            chosen["temporary_bytes"] / without["temporary_bytes"],
            "ratio",
            Target("<=", 0.5),
            shape | {"temporary_mib": memory},
        ),
        Row(
            "remat_time_ratio",
            median_ratio(chosen["seconds"], without["seconds"]),
            "ratio",
            Target("<=", 1.35),
            shape | {"seconds": seconds},
        ),
    ]


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remat", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--remat", choices=("norms", "blocks"), default="blocks")
    parser.add_argument("--batch", type=int, default=2, help="clips of a step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed of each")
    args = parser.parse_args(arguments)
    rows = measure_rows(args.remat, batch=args.batch, dtype=args.dtype, repeats=args.repeats)
    write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    run_command(main)
