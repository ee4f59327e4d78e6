"""Metrics and rows of `benchmarks.tpu_aot` and `gpu_aot`, without their compilers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import aot, gpu_aot, measure, tpu_aot

STEP: dict[str, Any] = {
    "cycles": 150_390_625,  # at the clock that gives v5e its peak: 0.1 s
    "cycles_by_part": {"video_encoder": 100_000_000, "bank": 50_390_625},
    "model_flops": 5.91e12,
    "compiler_flops": 6e12,
    "hbm_bytes": 12e9,
    "videos_per_chip": 16,
    "transformer": False,
    "parameters": 10_000_000,
    "exchange": {"merge": 5_000_000, "gather": 4_000_000},
    "collectives": [
        {"kind": "all-gather", "part": "bank", "times": 3, "bytes": 4_000_000},
        {"kind": "all-reduce", "part": "step", "times": 9, "bytes": 40_000_000},
    ],
}


def test_times_and_shares_of_a_chip() -> None:
    found = tpu_aot.estimate("v5e:16x16", STEP)
    assert found["compute_ms"] == pytest.approx(100, rel=1e-3)
    assert found["mfu"] == pytest.approx(0.3, rel=1e-3)
    assert found["hbm_fraction"] == pytest.approx(0.75)
    assert found["hbm_headroom_gb"] == pytest.approx(4)
    # 4 MB once and 40 MB twice, at 200 GB/s.
    seconds = (4e6 + 2 * 40e6) * 255 / 256 / 200e9
    assert found["interconnect_ms"] == pytest.approx(1e3 * seconds)
    assert found["interconnect_over_compute"] == pytest.approx(seconds / 0.1, rel=1e-3)
    assert found["mfu_if_nothing_overlaps"] < found["mfu"]


def test_rows_have_their_names_and_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiled(target: str, arguments: dict[str, Any], environment: Any) -> dict[str, Any]:
        calls.append((target, arguments["topology"], environment["JAX_PLATFORMS"]))
        return STEP

    monkeypatch.setattr(measure, "run_child", compiled)
    rows = [
        row
        for topology in ("v5e:4x4", "v5e:16x16")
        for row in tpu_aot.step_rows({"topology": topology})
    ]
    told = {row.name: (str(row.target) if row.target else None, row.verdict) for row in rows}
    assert told == {
        "tpu_v5e_16_hbm_fraction": ("<= 0.9", "met"),
        "tpu_v5e_16_mfu_estimate": (">= 0.28", "met"),
        "collective_mb_per_chip_16": ("<= 44", "met"),
        "interconnect_over_compute_16": (None, ""),
        "tpu_v5e_256_hbm_fraction": (None, ""),
        "tpu_v5e_256_mfu_estimate": (None, ""),
        "collective_mb_per_chip_256": ("<= 44", "met"),
        "interconnect_over_compute": ("<= 0.1", "met"),
    }
    assert calls[1] == ("benchmarks.aot:compile_step", "v5e:16x16", "cpu")

    monkeypatch.setattr(measure, "run_child", lambda *_, **__: {**STEP, "transformer": True})
    mfu = tpu_aot.step_rows({"topology": "v5e:4x4"})[1]
    assert (str(mfu.target), mfu.verdict) == (">= 0.45", "MISSED")


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out. Used 31.50G of 15.75G hbm. Exceeded",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (31.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_a_program_that_does_not_fit_says_by_how_much(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise measure.ChildError(message)

    monkeypatch.setattr(measure, "run_child", refuse)
    memory, mfu = tpu_aot.step_rows({"topology": "v5e:4x4"})
    assert (memory.value, memory.verdict) == (2.0, "MISSED")
    assert (mfu.value, mfu.detail["skipped"]) == (
        None,
        "the program needs 2.00 of the chip's memory",
    )
    monkeypatch.setattr(measure, "run_child", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tpu_aot.step_rows({"topology": "v5e:4x4"})


def test_a_compiler_that_dies_leaves_the_other_topologies(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise measure.ChildError("benchmarks.aot:compile_step failed with status -11:\n")

    monkeypatch.setattr(measure, "run_child", die)
    rows = tpu_aot.step_rows({"topology": "v6e:4x4"})
    assert [(row.name, row.verdict) for row in rows] == [
        ("tpu_v6e_16_hbm_fraction", "SKIPPED"),
        ("tpu_v6e_16_mfu_estimate", "SKIPPED"),
    ]
    assert "segmentation fault" in rows[0].detail["skipped"]


def test_rematerialisation_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []

    def compiled(target: str, arguments: dict[str, Any], environment: Any) -> dict[str, Any]:
        settings.append(arguments["overrides"])
        saved = arguments["overrides"]["execution.remat"] == "blocks"
        return {"memory": {"temp": 3e9 if saved else 10e9}, "cycles": 130 if saved else 100}

    monkeypatch.setattr(measure, "run_child", compiled)
    rows = tpu_aot.remat_rows({"overrides": {"bank.size": "4096"}}, "blocks")
    assert {row.name: row.value for row in rows} == {
        "tpu_remat_memory_ratio": pytest.approx(0.3),
        "tpu_remat_time_ratio": pytest.approx(1.3),
    }
    assert settings == [
        {"bank.size": "4096", "execution.remat": "none"},
        {"bank.size": "4096", "execution.remat": "blocks"},
    ]


def test_overrides_are_those_of_main(capsys: pytest.CaptureFixture[str]) -> None:
    parser = measure.command_parser("tpu_aot", "", json=False)
    _, options = measure.parse_with_overrides(
        parser, ["--config.model.video.lowering=folded", "--config.bank.size=131072"]
    )
    overrides = dict(option.removeprefix("--config.").split("=", 1) for option in options)
    config = aot.config_of("kinetics400", overrides)
    assert config.model.video.lowering == "folded"
    assert config.model.video.name == "r2plus1d_18"
    assert config.bank.size == 131_072
    other = {"model.video.name": "vivit_s", "model.video.subtract_time_mean": "False"}
    assert aot.config_of("kinetics400", other).model.video.name == "vivit_s"
    with pytest.raises(ValueError, match=r"model\.video\.name=vivit_s has no such setting"):
        aot.config_of("kinetics400", other | overrides)
    with pytest.raises(ValueError, match=r"kinetics400 has no key 'bank\.sise'"):
        aot.config_of("kinetics400", {"bank.sise": "1"})
    with pytest.raises(SystemExit):
        measure.parse_with_overrides(parser, ["--bank.size=1"])
    assert "--bank.size=1: overrides are --config.KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "topology", "requirements"),
    [
        (tpu_aot, "v9:4x4", "requirements-tpu-aot.txt"),
        (gpu_aot, "v5e:4x4", "requirements-gpu-aot.txt"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path, capsys, monkeypatch, command, topology, requirements
) -> None:
    out = ["--json", str(tmp_path / "rows.json")]
    with pytest.raises(SystemExit, match="1"):
        measure.run_command(command.main, [*out, "--topology", topology])
    assert f": error: topology '{topology}' is not" in capsys.readouterr().err
    monkeypatch.setattr(measure, "version", lambda _: None)
    with pytest.raises(SystemExit, match="1"):
        measure.run_command(command.main, out)
    assert f"pip install -r {requirements}" in capsys.readouterr().err


def test_what_was_compiled_is_not_compiled_again(tmp_path) -> None:
    def step(x: jax.Array) -> jax.Array:
        return x @ x

    lowered = jax.jit(step).lower(jnp.ones((4, 4)))
    text, facts = aot.compile_cached(lowered, "v5e:4x4", tmp_path)
    assert facts["memory"]["argument"] == 64

    class Uncompilable:
        """The same program, which cannot be compiled again."""

        def as_text(self) -> str:
            return lowered.as_text()

    again = aot.compile_cached(Uncompilable(), "v5e:4x4", tmp_path)
    assert again == (text, facts)
    with pytest.raises(AttributeError, match="compile"):
        aot.compile_cached(Uncompilable(), "v5e:16x16", tmp_path)
