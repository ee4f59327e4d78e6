"""Costs of the pretraining step, compiled for GPUs that need not exist: `… benchmarks.gpu_aot`.

No GPU is needed: XLA compiles the step of `avcl_jax.main` for a host of GPUs. Bytes, layouts and
exchanges are those of the compiled program, times those of the roofline model (`gpu_costs`), which
a GPU does not beat; nothing is a measured speed. docs/performance_measuring.md explains each
row.
"""

from __future__ import annotations

import sys
from typing import Any

from avcl_jax.errors import UserError
from avcl_jax.paths import local_path
from benchmarks import measure
from benchmarks.gpu_costs import gpu_of
from benchmarks.measure import Row, Target

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Only the compiler is asked: the libraries of CUDA need not be there.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
TOPOLOGIES = ("h100:1", "h100:8", "a100:8")


def step_rows(arguments: dict[str, Any]) -> list[Row]:
    """Compiles the step for the topology of the arguments, prints its metrics, returns its rows."""
    topology = arguments["topology"]
    gpu, gpus = gpu_of(topology)
    step = measure.run_child("benchmarks.aot:compile_step", arguments, environment=ENVIRONMENT)
    exchanged = sum(entry["bytes"] for entry in step["collectives"]) / 1e6
    # Gradients once, as float32, and the cheaper exchange of the bank.
    bound = (4 * step["parameters"] + min(step["exchange"].values())) / 1e6
    values = {
        "channels_last_share": (
            step["channels_last_flops"] / step["convolution_flops"],
            Target(">=", 1.0),
        ),
        "relayout_share": (step["relayout_bytes"] / step["bytes"], Target("<=", 0.02)),
        "hbm_share": (step["hbm_bytes"] / gpu.memory_bytes, Target("<=", 0.90)),
        "roofline_share_estimate": (
            step["model_flops"] / gpu.peak_flops / step["seconds"],
            Target(">=", 0.30),
        ),
    }
    detail = {"compiler estimate": True, **arguments, **step, "source": gpu.source}
    name = f"gpu_{topology.replace(':', '_')}"
    rows = [
        Row(f"{name}_{row}", value, "fraction", target, detail)
        for row, (value, target) in values.items()
    ]
    if gpus > 1:
        target = Target("<=", round(bound, 1))
        rows.append(Row(f"{name}_collective_mb", exchanged, "MB", target, detail))
    kinds = ", ".join(
        f"{kind} {seconds / step['seconds']:.0%}"
        for kind, seconds in sorted(step["seconds_by_kind"].items(), key=lambda kind: -kind[1])
    )
    print(
        f"{topology} (estimate, per GPU): {step['videos_per_chip']} videos = "
        f"{2 * step['videos_per_chip']} clips\n"
        f"  memory {step['hbm_bytes'] / 1e9:.2f} GB\n"
        f"  {step['model_flops'] / 1e12:.2f} model TFLOP, {step['bytes'] / 1e9:.1f} GB moved, at "
        f"least {1e3 * step['seconds']:.1f} ms: {kinds}\n"
        f"  exchanged {exchanged:.1f} MB, at least {1e3 * step['exchange_seconds']:.2f} ms, of "
        f"which {1e3 * step['overlapped_seconds']:.2f} ms behind computation"
    )
    return rows


def main(words: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("gpu_aot", __doc__)
    parser.epilog = "Overrides of the preset: --config.model.video.lowering=direct and so on."
    parser.add_argument("--topology", action="append", help=f"repeatable ({' '.join(TOPOLOGIES)})")
    parser.add_argument("--preset", default="kinetics400", help="preset of configs/pretrain.py")
    parser.add_argument(
        "--batch-per-gpu", type=int, default=32, help="videos, two clips each (%(default)s)"
    )
    parser.add_argument(
        "--cache", type=local_path, default="data/gpu_aot", help="compiled programs"
    )
    args, options = measure.parse_with_overrides(parser, words)
    topologies = args.topology or list(TOPOLOGIES)
    for topology in topologies:
        gpu_of(topology)
    if measure.version("jax-cuda12-plugin") is None:
        raise UserError("no compiler for GPUs: pip install -r requirements-gpu-aot.txt")
    settings = {
        "preset": args.preset,
        "overrides": dict(option.removeprefix("--config.").split("=", 1) for option in options),
        "videos_per_chip": args.batch_per_gpu,
        "cache": str(args.cache),
    }
    rows: list[Row] = []
    for topology in topologies:
        print(f"compiling the step for {topology}", file=sys.stderr)
        rows += step_rows({"topology": topology, **settings})
        measure.write_json(args.json, rows)  # after each, because a step takes minutes
    measure.report(args.json, rows)


if __name__ == "__main__":
    measure.run_command(main)
