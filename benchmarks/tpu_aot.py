"""What the TPU compiler says of the pretraining step: `python -m benchmarks.tpu_aot --json F`.

No TPU is needed: libtpu compiles the step that `avcl_jax.main` runs for a pod that is not there.
Every figure is a compiler estimate, per chip; docs/performance_tpu.md says how each comes about.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import signal
import sys
from typing import Any

from avcl_jax.errors import UserError
from avcl_jax.paths import local_path
from benchmarks.measure import (
    ChildError,
    Row,
    SkipError,
    Target,
    print_table,
    run_child,
    run_command,
    writable_path,
    write_json,
)
from benchmarks.tpu_chips import chip_of, exchange_seconds

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # No metadata server tells this machine what TPU it has; other compilations may run beside.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x2")
_TARGETS = {
    "tpu_v5e_16_hbm_share": Target("<=", 0.90),
    "tpu_v5e_16_mfu_estimate": Target(">=", 0.28),
    "interconnect_over_compute": Target("<=", 0.10),
    "bank_1m_collective_share": Target("<=", 0.25),
    "tpu_remat_memory_ratio": Target("<=", 0.5),
    "tpu_remat_time_ratio": Target("<=", 1.35),
}
_MILLION_ROWS = 2**20


def need_libtpu() -> None:
    """Raises SkipError where there is no TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise SkipError("libtpu is not installed: pip install -r requirements-tpu-aot.txt")


def estimate(topology: str, found: dict[str, Any]) -> dict[str, Any]:
    """Times and shares of a compiled step from its figures and those of the chip.

    Args:
        topology: "v5e:4x4".
        found: as `tpu_compile.compile_step` returns it.

    Returns:
        Seconds of computation at the chip's clock, seconds of the interconnect by kind of
        exchange, utilisation with the exchange hidden and with it added, share of memory.
    """
    chip, axes = chip_of(topology)
    compute = found["cycles"] / chip.clock_hz
    links = {
        f"{entry['kind']} ({entry['part']})": exchange_seconds(
            entry["kind"], entry["bytes"], chip, axes
        )
        for entry in found["collectives"]
    }
    useful = found["model_flops"] / chip.peak_flops
    return {
        "clock_ghz": round(chip.clock_hz / 1e9, 3),
        "compute_ms": 1e3 * compute,
        "interconnect_ms": 1e3 * sum(links.values()),
        "interconnect_ms_by_kind": {kind: 1e3 * seconds for kind, seconds in links.items()},
        "interconnect_over_compute": sum(links.values()) / compute,
        "mfu": useful / compute,
        "mfu_if_nothing_overlaps": useful / (compute + sum(links.values())),
        "hbm_share": found["hbm_bytes"] / chip.hbm_bytes,
        "hbm_headroom_gb": (chip.hbm_bytes - found["hbm_bytes"]) / 1e9,
        "collective_mb": sum(entry["bytes"] for entry in found["collectives"]) / 1e6,
        "source": chip.source,
    }


def collective_bound_mb(found: dict[str, Any]) -> float:
    """Gradients once, as float32, and the cheaper exchange of the bank: MB a chip."""
    return (4 * found["parameters"] + min(found["exchange"].values())) / 1e6


def _too_large(error: str) -> float | None:
    """Share of the memory that a program would need which the compiler refuses."""
    found = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", error) or re.search(
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error
    )
    return float(found[1]) / float(found[2]) if found else None


def step_rows(topology: str, arguments: dict[str, Any]) -> list[Row]:
    """Compiles the step for one topology; prints its figures and returns its rows."""
    _, axes = chip_of(topology)
    chips = math.prod(axes)
    name = f"tpu_{topology.partition(':')[0]}_{chips}"
    share, mfu = f"{name}_hbm_share", f"{name}_mfu_estimate"
    try:
        found = run_child(
            "benchmarks.tpu_compile:compile_step",
            {"topology": topology, **arguments},
            environment=ENVIRONMENT,
        )
    except ChildError as error:
        if f"status {-signal.SIGSEGV}" in str(error):
            crash = {"skipped": "the compiler ended with a segmentation fault", **arguments}
            return [
                Row(row, None, "share", _TARGETS.get(row), {"topology": topology, **crash})
                for row in (share, mfu)
            ]
        needed = _too_large(str(error))
        if needed is None:
            raise
        detail = {"topology": topology, **arguments, "refused": "more than the chip's memory"}
        reason = {"skipped": f"the program needs {needed:.2f} of the chip's memory", **detail}
        return [
            Row(share, needed, "share", _TARGETS.get(share), detail),
            Row(mfu, None, "share", _TARGETS.get(mfu), reason),
        ]
    estimated = estimate(topology, found)
    _print_step(topology, found, estimated)
    detail = {"compiler estimate": True, **arguments, **found, **estimated}
    rows = [
        Row(share, estimated["hbm_share"], "share", _TARGETS.get(share), detail),
        Row(mfu, estimated["mfu"], "share", _TARGETS.get(mfu), detail),
    ]
    bound = Target("<=", round(collective_bound_mb(found), 1))
    if topology.startswith("v5e"):
        # The target is for a whole pod, where the exchange is dearest.
        over = "interconnect_over_compute" + ("" if chips == 256 else f"_{chips}")
        rows += [
            Row(f"collective_mb_per_chip_{chips}", estimated["collective_mb"], "MB", bound, detail),
            Row(
                over,
                estimated["interconnect_over_compute"],
                "ratio",
                _TARGETS.get(over),
                detail,
            ),
        ]
    return rows


def remat_rows(topology: str, arguments: dict[str, Any], remat: str) -> list[Row]:
    """Compiles the step with rematerialisation and without: temporary memory and cycles."""
    found = {
        setting: run_child(
            "benchmarks.tpu_compile:compile_step",
            {
                "topology": topology,
                **arguments,
                "overrides": {**arguments["overrides"], "execution.remat": setting},
            },
            environment=ENVIRONMENT,
        )
        for setting in ("none", remat)
    }
    detail = {
        "compiler estimate": True,
        "topology": topology,
        **arguments,
        "remat": remat,
        "temporary_gb": {name: step["memory"]["temp"] / 1e9 for name, step in found.items()},
        "cycles": {name: step["cycles"] for name, step in found.items()},
    }
    ratios = {
        "tpu_remat_memory_ratio": found[remat]["memory"]["temp"] / found["none"]["memory"]["temp"],
        "tpu_remat_time_ratio": found[remat]["cycles"] / found["none"]["cycles"],
    }
    return [Row(name, value, "ratio", _TARGETS[name], detail) for name, value in ratios.items()]


def bank_row(topology: str, arguments: dict[str, Any]) -> Row:
    """Compiles the bank's part of a step at a million rows."""
    overrides = {**arguments["overrides"], "bank.size": str(_MILLION_ROWS)}
    found = run_child(
        "benchmarks.tpu_compile:compile_bank",
        {"topology": topology, **arguments, "overrides": overrides},
        environment=ENVIRONMENT,
    )
    moved = sum(entry["bytes"] for entry in found["collectives"])
    temporary = found["memory"]["temp"]
    gathered = found["exchange"]["gather"]
    return Row(
        "bank_1m_collective_share",
        (moved + temporary) / gathered,
        "ratio",
        _TARGETS["bank_1m_collective_share"],
        {
            "compiler estimate": True,
            **arguments,
            "collective_mb": moved / 1e6,
            "temporary_mb": temporary / 1e6,
            "gather_mb": gathered / 1e6,
            "collective_share": moved / gathered,
            **found,
        },
    )


def _print_step(topology: str, found: dict[str, Any], estimated: dict[str, Any]) -> None:
    cycles = found["cycles"]
    parts = ", ".join(f"{k} {v / cycles:.0%}" for k, v in found["cycles_by_part"].items())
    print(
        f"{topology} (compiler estimate, per chip): {found['videos_per_chip']} videos = "
        f"{2 * found['videos_per_chip']} clips\n"
        f"  memory {found['hbm_bytes'] / 1e9:.2f} GB, {estimated['hbm_share']:.0%}, headroom "
        f"{estimated['hbm_headroom_gb']:.2f} GB\n"
        f"  {found['model_flops'] / 1e12:.2f} model TFLOP ({found['compiler_flops'] / 1e12:.2f} by "
        f"the compiler's count), {cycles / 1e6:.1f} M cycles = {estimated['compute_ms']:.1f} ms at "
        f"{estimated['clock_ghz']} GHz, MFU {estimated['mfu']:.3f}\n"
        f"  cycles: {parts}\n"
        f"  exchanged {estimated['collective_mb']:.1f} MB, {estimated['interconnect_ms']:.2f} ms, "
        f"{estimated['interconnect_over_compute']:.1%} of the computation"
    )
    for entry in found["collectives"]:
        print(
            f"    {entry['kind']:<20}{entry['part']:<6}{entry['times']:>5} x "
            f"{entry['bytes'] / 1e6:>9.2f} MB"
        )


def parse_overrides(words: list[str]) -> dict[str, str]:
    """`--config.a.b=value` → {"a.b": "value"}.

    Raises:
        UserError: on anything else.
    """
    overrides = {}
    for word in words:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", word)
        if found is None:
            raise UserError(f"unknown argument {word!r}: overrides are --config.KEY=VALUE")
        overrides[found[1]] = found[2]
    return overrides


def main(words: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_aot",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Overrides of the preset: --config.model.video.lowering=direct and so on.",
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--topology", action="append", help=f"repeatable ({' '.join(TOPOLOGIES)})")
    parser.add_argument("--preset", default="kinetics400", help="of configs/pretrain.py")
    parser.add_argument(
        "--batch-per-chip", type=int, default=16, help="videos, of two clips each (%(default)s)"
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
    args, rest = parser.parse_known_args(words)
    try:
        arguments = {
            "preset": args.preset,
            "overrides": parse_overrides(rest),
            "videos_per_chip": args.batch_per_chip,
            "cache": str(args.cache),
        }
        topologies = args.topology or list(TOPOLOGIES)
        for topology in topologies:
            chip_of(topology)
        need_libtpu()
    except (UserError, SkipError) as error:
        print(f"benchmarks.tpu_aot: error: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    if not args.no_bank:
        print("compiling the bank of a million rows", file=sys.stderr)
        rows.append(bank_row(topologies[0], arguments))
        write_json(args.json, rows)
    for topology in topologies:
        print(f"compiling the step for {topology}", file=sys.stderr)
        rows += step_rows(topology, arguments)
        # After each: a full step takes minutes.
        write_json(args.json, rows)
    if args.remat:
        print(f"compiling the step with execution.remat={args.remat}", file=sys.stderr)
        rows += remat_rows(topologies[0], arguments, args.remat)
        write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    run_command(main)
