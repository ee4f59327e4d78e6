"""Estimates of the TPU compiler for the pretraining step: `python -m benchmarks.tpu_aot --json F`.

No TPU is needed: libtpu compiles the step of `avcl_jax.main` for a pod that need not exist. All
values are compiler estimates, per chip; docs/performance_measuring.md explains each.
"""

from __future__ import annotations

import math
import re
import signal
import sys
from typing import Any

from avcl_jax.errors import UserError
from avcl_jax.paths import local_path
from benchmarks import measure
from benchmarks.measure import ChildError, Row, Target
from benchmarks.tpu_chips import chip_of, exchange_seconds

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Without a metadata server that describes the TPU, and in parallel with other compilations.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x2")
_TARGETS = {
    "tpu_v5e_16_hbm_fraction": Target("<=", 0.90),
    "interconnect_over_compute": Target("<=", 0.10),
    "bank_1m_collective_ratio": Target("<=", 0.25),
    "tpu_remat_memory_ratio": Target("<=", 0.5),
    "tpu_remat_time_ratio": Target("<=", 1.35),
}
# By topology, and whether the video encoder, most of the step, is a transformer.
_MFU_TARGETS = {
    ("v5e:4x4", False): Target(">=", 0.28),
    ("v5e:4x4", True): Target(">=", 0.45),
    ("v6e:4x4", True): Target(">=", 0.45),
}
_MILLION_ROWS = 2**20
_ESTIMATE = {"compiler estimate": True}


def _row(name: str, value: float | None, unit: str, detail: dict[str, Any]) -> Row:
    return Row(name, value, unit, _TARGETS.get(name), detail)


def _compile(function: str, arguments: dict[str, Any], **overrides: str) -> dict[str, Any]:
    """Calls a function of `aot` in its own process, with further overrides."""
    if overrides:
        arguments = {**arguments, "overrides": {**arguments["overrides"], **overrides}}
    return measure.run_child(f"benchmarks.aot:{function}", arguments, environment=ENVIRONMENT)


def estimate(topology: str, step: dict[str, Any]) -> dict[str, Any]:
    """Times and fractions from the result of `aot.compile_step` and the chip's data.

    Returns:
        Seconds of computation at the chip's clock, seconds of the interconnect by kind of
        exchange, utilisation with the exchange hidden and with it added, fraction of the memory.
    """
    chip, axes = chip_of(topology)
    compute = step["cycles"] / chip.clock_hz
    links = {
        f"{entry['kind']} ({entry['part']})": exchange_seconds(
            entry["kind"], entry["bytes"], chip, axes
        )
        for entry in step["collectives"]
    }
    useful = step["model_flops"] / chip.peak_flops
    return {
        "clock_ghz": round(chip.clock_hz / 1e9, 3),
        "compute_ms": 1e3 * compute,
        "interconnect_ms": 1e3 * sum(links.values()),
        "interconnect_ms_by_kind": {kind: 1e3 * seconds for kind, seconds in links.items()},
        "interconnect_over_compute": sum(links.values()) / compute,
        "mfu": useful / compute,
        "mfu_if_nothing_overlaps": useful / (compute + sum(links.values())),
        "hbm_fraction": step["hbm_bytes"] / chip.hbm_bytes,
        "hbm_headroom_gb": (chip.hbm_bytes - step["hbm_bytes"]) / 1e9,
        "collective_mb": sum(entry["bytes"] for entry in step["collectives"]) / 1e6,
        "source": chip.source,
    }


def _needed_fraction(error: str) -> float | None:
    """Fraction of the memory that a refused program needs; None for other errors."""
    match = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", error) or re.search(
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error
    )
    return float(match[1]) / float(match[2]) if match else None


def step_rows(arguments: dict[str, Any]) -> list[Row]:
    """Compiles the step for the topology of the arguments, prints its metrics, returns its rows."""
    topology = arguments["topology"]
    _, axes = chip_of(topology)
    chips = math.prod(axes)
    name = f"tpu_{topology.partition(':')[0]}_{chips}"
    memory, mfu = f"{name}_hbm_fraction", f"{name}_mfu_estimate"
    try:
        step = _compile("compile_step", arguments)
    except ChildError as error:
        needed = _needed_fraction(str(error))
        if needed is not None:
            reason = {"skipped": f"the program needs {needed:.2f} of the chip's memory"}
            detail = {**arguments, "refused": "more than the chip's memory"}
            return [
                _row(memory, needed, "fraction", detail),
                _row(mfu, None, "fraction", detail | reason),
            ]
        if f"status {-signal.SIGSEGV}" not in str(error):
            raise
        detail = {"skipped": "the compiler ended with a segmentation fault", **arguments}
        return [_row(row, None, "fraction", detail) for row in (memory, mfu)]
    estimated = estimate(topology, step)
    _print_step(topology, step, estimated)
    detail = {**_ESTIMATE, **arguments, **step, **estimated}
    target = _MFU_TARGETS.get((topology, step["transformer"]))
    rows = [
        _row(memory, estimated["hbm_fraction"], "fraction", detail),
        Row(mfu, estimated["mfu"], "fraction", target, detail),
    ]
    if topology.startswith("v5e"):
        # Gradients once, as float32, and the cheaper exchange of the bank.
        bound = (4 * step["parameters"] + min(step["exchange"].values())) / 1e6
        collective = f"collective_mb_per_chip_{chips}"
        target = Target("<=", round(bound, 1))
        rows.append(Row(collective, estimated["collective_mb"], "MB", target, detail))
        # The target is for a whole pod, where the exchange costs most.
        over = "interconnect_over_compute" + ("" if chips == 256 else f"_{chips}")
        rows.append(_row(over, estimated["interconnect_over_compute"], "ratio", detail))
    return rows


def remat_rows(arguments: dict[str, Any], remat: str) -> list[Row]:
    """Compiles the step with and without rematerialisation: temporary memory and cycles."""
    steps = {
        setting: _compile("compile_step", arguments, **{"execution.remat": setting})
        for setting in ("none", remat)
    }
    temporary = {setting: step["memory"]["temp"] for setting, step in steps.items()}
    cycles = {setting: step["cycles"] for setting, step in steps.items()}
    detail = {
        **_ESTIMATE,
        **arguments,
        "remat": remat,
        "temporary_gb": {setting: value / 1e9 for setting, value in temporary.items()},
        "cycles": cycles,
    }
    return [
        _row("tpu_remat_memory_ratio", temporary[remat] / temporary["none"], "ratio", detail),
        _row("tpu_remat_time_ratio", cycles[remat] / cycles["none"], "ratio", detail),
    ]


def bank_row(arguments: dict[str, Any]) -> Row:
    """Compiles the bank's part of a step with a million rows."""
    bank = _compile("compile_bank", arguments, **{"bank.size": str(_MILLION_ROWS)})
    moved = sum(entry["bytes"] for entry in bank["collectives"])
    temporary, gathered = bank["memory"]["temp"], bank["exchange"]["gather"]
    detail = {
        **_ESTIMATE,
        **arguments,
        "collective_mb": moved / 1e6,
        "temporary_mb": temporary / 1e6,
        "gather_mb": gathered / 1e6,
        "collective_over_gather": moved / gathered,
        **bank,
    }
    return _row("bank_1m_collective_ratio", (moved + temporary) / gathered, "ratio", detail)


def _print_step(topology: str, step: dict[str, Any], estimated: dict[str, Any]) -> None:
    cycles = step["cycles"]
    parts = ", ".join(f"{k} {v / cycles:.0%}" for k, v in step["cycles_by_part"].items())
    print(
        f"{topology} (compiler estimate, per chip): {step['videos_per_chip']} videos = "
        f"{2 * step['videos_per_chip']} clips\n"
        f"  memory {step['hbm_bytes'] / 1e9:.2f} GB, {estimated['hbm_fraction']:.0%}, headroom "
        f"{estimated['hbm_headroom_gb']:.2f} GB\n"
        f"  {step['model_flops'] / 1e12:.2f} model TFLOP ({step['compiler_flops'] / 1e12:.2f} by "
        f"the compiler's count), {cycles / 1e6:.1f} M cycles = {estimated['compute_ms']:.1f} ms at "
        f"{estimated['clock_ghz']} GHz, MFU {estimated['mfu']:.3f}\n"
        f"  cycles: {parts}\n"
        f"  exchanged {estimated['collective_mb']:.1f} MB, {estimated['interconnect_ms']:.2f} ms, "
        f"{estimated['interconnect_over_compute']:.1%} of the computation"
    )
    for entry in step["collectives"]:
        print(
            f"    {entry['kind']:<20}{entry['part']:<6}{entry['times']:>5} x "
            f"{entry['bytes'] / 1e6:>9.2f} MB"
        )


def main(words: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("tpu_aot", __doc__)
    parser.epilog = "Overrides of the preset: --config.model.video.lowering=direct and so on."
    parser.add_argument("--topology", action="append", help=f"repeatable ({' '.join(TOPOLOGIES)})")
    parser.add_argument("--preset", default="kinetics400", help="preset of configs/pretrain.py")
    parser.add_argument(
        "--batch-per-chip", type=int, default=16, help="videos, two clips each (%(default)s)"
    )
    parser.add_argument(
        "--cache", type=local_path, default="data/tpu_aot", help="compiled programs"
    )
    parser.add_argument(
        "--remat",
        choices=("norms", "blocks"),
        help="also compare this setting of execution.remat with none, on the first topology",
    )
    parser.add_argument("--no-bank", action="store_true", help="leave out the row of a large bank")
    args, options = measure.parse_with_overrides(parser, words)
    settings = {
        "preset": args.preset,
        "overrides": dict(option.removeprefix("--config.").split("=", 1) for option in options),
        "videos_per_chip": args.batch_per_chip,
        "cache": str(args.cache),
    }
    topologies = args.topology or list(TOPOLOGIES)
    for topology in topologies:
        chip_of(topology)
    if measure.version("libtpu") is None:
        raise UserError("libtpu is not installed: pip install -r requirements-tpu-aot.txt")
    first = {"topology": topologies[0], **settings}
    rows: list[Row] = []
    if not args.no_bank:
        print("compiling the bank of a million rows", file=sys.stderr)
        rows.append(bank_row(first))
    for topology in topologies:
        print(f"compiling the step for {topology}", file=sys.stderr)
        rows += step_rows({"topology": topology, **settings})
        measure.write_json(args.json, rows)  # after each, because a step takes minutes
    if args.remat:
        print(f"compiling the step with execution.remat={args.remat}", file=sys.stderr)
        rows += remat_rows(first, args.remat)
    measure.report(args.json, rows)


if __name__ == "__main__":
    measure.run_command(main)
