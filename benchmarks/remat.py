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

from benchmarks.measure import (
    Row,
    Target,
    add_repeats,
    command_parser,
    ratio,
    report,
    run_child,
    run_command,
    seconds_in_turns,
    spread,
)
from benchmarks.steps import CLIP, ENCODER


def compare(*, remats: Sequence[str], batch: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Compiles and times a step with each setting of `execution.remat`, in turns.

    Args:
        batch: clips per step.
        dtype: dtype of the computation.
        repeats: number of timed steps.

    Returns:
        By setting: `temporary_bytes` and `flops` of the compiled step, `device`,
        `compile_seconds`, and `seconds` of every step.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.steps import video_encoder

    encoders = {remat: video_encoder(remat=remat, dtype=jnp.dtype(dtype)) for remat in remats}
    video = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *CLIP)), jnp.float32)
    init = functools.partial(encoders[remats[0]].init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), video)
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

    calls, results = {}, {}
    for remat, encoder in encoders.items():
        begin = time.perf_counter()
        program: Any = jax.jit(functools.partial(step, encoder)).lower(variables, video).compile()
        results[remat] = {
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "flops": program.cost_analysis().get("flops"),
            "device": jax.devices()[0].device_kind,
            "compile_seconds": round(time.perf_counter() - begin, 1),
        }
        print(remat, results[remat], file=sys.stderr, flush=True)
        calls[remat] = lambda program=program: jax.block_until_ready(program(variables, video))
        calls[remat]()  # the first run is not timed
    for remat, seconds in seconds_in_turns(calls, repeats=repeats).items():
        results[remat]["seconds"] = seconds
    return results


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("remat", __doc__)
    parser.add_argument(
        "--remat", choices=("norms", "blocks"), default="blocks", help="execution.remat"
    )
    parser.add_argument("--batch", type=int, default=2, help="clips per step")
    parser.add_argument("--dtype", default="float32", help="dtype of the computation")
    add_repeats(parser)
    args = parser.parse_args(arguments)
    settings = {"batch": args.batch, "dtype": args.dtype}
    results = run_child(
        "benchmarks.remat:compare",
        {"remats": ("none", "norms", "blocks"), "repeats": args.repeats, **settings},
    )
    about = {"remat": args.remat, "encoder": ENCODER, "clip": CLIP, **settings}
    about["device"] = results["none"]["device"]
    memory = {name: result["temporary_bytes"] for name, result in results.items()}
    seconds = {name: result["seconds"] for name, result in results.items()}
    time_ratio, _ = ratio(seconds, args.remat, "none", quantity="seconds")
    mib = {name: round(value / 2**20, 1) for name, value in memory.items()}
    report(
        args.json,
        [
            Row(
                "remat_memory_ratio",
                memory[args.remat] / memory["none"],
                "ratio",
                Target("<=", 0.5),
                about | {"temporary_mib": mib},
            ),
            Row(
                "remat_time_ratio",
                time_ratio,
                "ratio",
                Target("<=", 1.35),
                about | {"seconds": {name: spread(values) for name, values in seconds.items()}},
            ),
        ],
    )


if __name__ == "__main__":
    run_command(main)
