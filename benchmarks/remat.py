"""Memory that rematerialisation in the backward pass saves, and its time.

    python -m benchmarks.remat --json remat.json

R(2+1)D-18 on clips of 16 x 112 x 112, forward and backward: ratios with and without
rematerialisation. For an accelerator: XLA's CPU compiler drops the barriers that delay the
recomputation, so it saves nothing there.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from benchmarks.measure import Row, Target
from benchmarks.steps import CLIP, ENCODER


def compare(
    *, remats: Sequence[str], batch: int, dtype: str, repeats: int, small: bool = False
) -> dict[str, Any]:
    """Compiles and times a step with each setting of `execution.remat`, in turns.

    Args:
        batch: clips per step.
        dtype: dtype of the computation.
        repeats: number of timed steps.
        small: a small network instead.

    Returns:
        By setting: `temporary_bytes` and `flops` of the compiled step, `device`,
        `compile_seconds`, and `seconds` of every step.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.steps import encoder_gradient, video_encoder

    encoders = {
        remat: video_encoder(small=small, remat=remat, dtype=jnp.dtype(dtype)) for remat in remats
    }
    video = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *CLIP)), jnp.float32)
    init = functools.partial(encoders[remats[0]].init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), video)
    # Any numbers do, and compiling the initialisation takes longer than the measurement.
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02), shapes)
    calls, results = {}, {}
    for remat, encoder in encoders.items():
        begin = time.perf_counter()
        step = jax.jit(functools.partial(encoder_gradient, encoder))
        program: Any = step.lower(variables, video).compile()
        results[remat] = {
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "flops": program.cost_analysis().get("flops"),
            "device": jax.devices()[0].device_kind,
            "compile_seconds": round(time.perf_counter() - begin, 1),
        }
        print(remat, results[remat], file=sys.stderr, flush=True)
        calls[remat] = lambda program=program: jax.block_until_ready(program(variables, video))
        calls[remat]()  # the first run is not timed
    for remat, seconds in measure.seconds_in_turns(calls, repeats=repeats).items():
        results[remat]["seconds"] = seconds
    return results


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("remat", __doc__, repeats=True)
    parser.add_argument(
        "--remat", choices=("norms", "blocks"), default="blocks", help="execution.remat"
    )
    parser.add_argument("--batch", type=int, default=2, help="clips per step")
    parser.add_argument("--dtype", default="float32", help="dtype of the computation")
    args = parser.parse_args(arguments)
    about = {"batch": args.batch, "dtype": args.dtype}
    results = measure.run_child(
        "benchmarks.remat:compare",
        {"remats": ("none", "norms", "blocks"), "repeats": args.repeats, **about},
    )
    about |= {"remat": args.remat, "encoder": ENCODER, "clip": CLIP}
    about["device"] = results["none"]["device"]
    memory = {name: [result["temporary_bytes"] / 2**20] for name, result in results.items()}
    seconds = {name: result["seconds"] for name, result in results.items()}
    rows = []
    for name, values, quantity, target in (
        ("remat_memory_ratio", memory, "temporary_mib", Target("<=", 0.5)),
        ("remat_time_ratio", seconds, "seconds", Target("<=", 1.35)),
    ):
        value, detail = measure.ratio(values, args.remat, "none", quantity=quantity)
        rows.append(Row(name, value, "ratio", target, about | detail))
    measure.report(args.json, rows)


if __name__ == "__main__":
    measure.run_command(main)
