"""What encoders know of real sounds: ESC-10, pretrained on the training folds alone.

    python -m data_prep esc50 ../shared/data/esc10 --subset esc10 --name esc10 --out data/esc10
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/esc10 --json esc10.json
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/esc10 --json esc10.json \\
        --demo runs/demo --long 20000
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/no_bank --json no_bank.json \\
        --config.bank.size=0

For every seed and official fold a run of `configs/pretrain.py:esc10` on the other four folds, then
`configs/linear_probe.py:esc10` on all of them: every file is tested by an encoder and a
classifier that never met it. Beside it a random encoder and classical features on the same files.
With every file as a class of its own: how often the first view of a file that the encoder never met
finds the last one among those of all 400 files, by the embedding and by the mean level alone.
What is finished is not run again, so the command may be stopped and given again. `--config.NAME`
changes a setting of every pretraining run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.evaluation.views import PretrainedRun
from avcl_jax.paths import local_path
from benchmarks.audio_settings import other_view_hits
from benchmarks.measure import (
    Row,
    Target,
    print_table,
    run_command,
    spread,
    writable_path,
    write_json,
)
from configs import pretrain as pretrain_config

FOLDS = ("1", "2", "3", "4", "5")
# Accuracy of an RBF machine on log-mel statistics of the same files.
CLASSICAL = 0.815


def pretrain(workdir: Path, records: Path, *, fold: str, seed: int, options: Sequence[str]) -> None:
    """Trains on all folds but one, or finds that it is done.

    Raises:
        subprocess.CalledProcessError: if it fails; it has said why.
    """
    _main(
        "configs/pretrain.py:esc10",
        workdir,
        f"--config.data.directory={records}",
        f"--config.data.select=fold!={fold}",
        f"--config.seed={seed}",
        *options,
    )


def classify(
    workdir: Path, records: Path, *, encoder: str, seed: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the protocol for an encoder, or one for each fold, and returns its results."""
    _main(
        "configs/linear_probe.py:esc10",
        workdir,
        f"--config.data.directory={records}",
        f"--config.encoder={encoder}",
        f"--config.seed={seed}",
        *options,
    )
    return json.loads((workdir / "results.json").read_text())


def _main(config: str, workdir: Path, *options: str) -> None:
    command = [sys.executable, "-m", "avcl_jax.main", f"--config={config}", f"--workdir={workdir}"]
    print(" ".join(command[1:]), *options, flush=True)
    subprocess.run([*command, *options], check=True)


def _accuracy(results: Mapping[str, Any], name: str = "top1") -> float:
    return results["metrics"][name]["value"]


def _by_fold(results: Mapping[str, Any]) -> list[float]:
    return [split["chosen"]["encoder"]["top1"] for split in results["details"]["splits"]]


def _minutes(workdir: Path) -> float:
    """Training time that the newest checkpoint of a run counts."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    seconds = [
        entry["train_seconds"] for entry in map(json.loads, lines) if "train_seconds" in entry
    ]
    return seconds[-1] / 60


def folds_rows(
    workdir: Path, records: Path, seeds: Sequence[int], *, options: Sequence[str] = ()
) -> list[Row]:
    """Pretrains for every fold and seed, and classifies.

    Args:
        workdir: of all runs.
        records: prepared ESC-10.
        seeds: of pretraining.
        options: changed settings of pretraining, --config.NAME=VALUE.
    """
    for seed, fold in itertools.product(seeds, FOLDS):
        run = workdir / f"seed{seed}/fold{fold}"
        pretrain(run, records, fold=fold, seed=seed, options=options)
    results = [
        classify(
            workdir / f"seed{seed}/classified",
            records,
            encoder=f"{workdir}/seed{seed}/fold{{fold}}",
            seed=seed,
        )
        for seed in seeds
    ]
    accuracies = [_accuracy(found) for found in results]
    randoms = [_accuracy(found, "top1_random") for found in results]
    gains = [a - b for a, b in zip(accuracies, randoms, strict=True)]
    classical = {
        name: _accuracy(results[0], f"top1_{name}")
        for name in ("mfcc_rbf", "log_mel_rbf", "log_mel_linear")
    }
    minutes = [
        _minutes(workdir / f"seed{seed}/fold{fold}")
        for seed, fold in itertools.product(seeds, FOLDS)
    ]
    detail = {
        "by_seed": accuracies,
        "intervals": [
            [found["metrics"]["top1"][end] for end in ("low", "high")] for found in results
        ],
        "by_fold": [_by_fold(found) for found in results],
        "random": randoms,
        "classical": classical,
        "options": list(options),
    }
    return [
        Row(
            "esc10_accuracy", statistics.mean(accuracies), "share", Target(">=", CLASSICAL), detail
        ),
        Row(
            "esc10_over_random",
            statistics.mean(gains),
            "share",
            Target(">=", 0.10),
            {"gains": gains},
        ),
        Row(
            "esc10_over_classical",
            statistics.mean(accuracies) - max(classical.values()),
            "share",
            Target(">=", 0.0),
            classical,
        ),
        Row("esc10_pretraining_minutes", max(minutes), "min", Target("<=", 8), spread(minutes)),
    ]


def demo_row(workdir: Path, records: Path, demo: Path) -> Row:
    """The audio encoder of the demo, which heard rendered sounds only."""
    found = classify(workdir / "demo", records, encoder=str(demo), seed=0)
    figure = found["metrics"]["top1"]
    detail = {"interval": [figure["low"], figure["high"]], "encoder": found["encoder"]}
    return Row("esc10_demo_encoder", figure["value"], "share", None, detail)


def own_file_row(workdir: Path, records: Path, seeds: Sequence[int]) -> Row:
    """R@1 of the other view of the same file among those of all files, for files never met."""
    dataset = RecordDataset(records, pretrain_config.get_config("esc10").data.split)
    by_seed: dict[str, list[float]] = {}
    chance = 0.0
    for seed in seeds:
        hits: dict[str, list[np.ndarray]] = {}
        for fold in FOLDS:
            run = PretrainedRun.load(workdir / f"seed{seed}/fold{fold}")
            usable = UsableRecords(dataset, run.spec)
            chance = 1 / len(usable)
            tested = np.isin(usable.indices, Selection.parse(f"fold={fold}").positions(dataset))
            for name, found in other_view_hits(run, usable).items():
                hits.setdefault(name, []).append(found[tested])
        for name, parts in hits.items():
            by_seed.setdefault(name, []).append(float(np.concatenate(parts).mean()))
    detail = by_seed | {"chance": chance}
    return Row("esc10_own_file", statistics.mean(by_seed["other_view"]), "share", None, detail)


def long_row(workdir: Path, records: Path, *, steps: int, fold: str) -> Row:
    """One longer pretraining, tested on its fold alone, beside the usual one of the same seed."""
    longer = (
        f"--config.steps={steps}",
        f"--config.bank.warmup_steps={round(0.6 * steps)}",
        f"--config.execution.checkpoint_every={max(steps // 20, 1)}",
    )
    place = FOLDS.index(fold)

    def tested(run: Path, classified: Path, options: Sequence[str]) -> float:
        pretrain(run, records, fold=fold, seed=0, options=options)
        # Only this fold's figure is looked at; the encoder heard the others, without labels.
        found = classify(
            classified,
            records,
            encoder=str(run),
            seed=0,
            options=("--config.data.allow_trained_on=True",),
        )
        return _by_fold(found)[place]

    run = workdir / f"long{steps}/fold{fold}"
    accuracy = tested(run, workdir / f"long{steps}/classified", longer)
    usual = tested(
        workdir / f"seed0/fold{fold}", workdir / f"long{steps}/classified_usual", options=()
    )
    detail = {"fold": fold, "steps": steps, "minutes": _minutes(run), "of_usual_length": usual}
    return Row("esc10_long", accuracy, "share", None, detail)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.esc10", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--records", type=local_path, default="data/esc10")
    parser.add_argument("--workdir", type=local_path, default="runs/esc10")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only what is asked for below"
    )
    parser.add_argument(
        "--demo", type=local_path, help="run of the demo, whose encoder is tested too"
    )
    parser.add_argument("--long", type=int, metavar="STEPS", help="one longer run, on fold 1")
    args, options = parser.parse_known_args(arguments)
    if unknown := [option for option in options if not option.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not (args.records / "dataset_info.json").exists():
        parser.error(f"{args.records} does not exist: see the first command of this module")
    workdir, records = args.workdir, args.records
    rows = []
    if args.seeds:
        rows += folds_rows(workdir, records, args.seeds, options=options)
        rows.append(own_file_row(workdir, records, args.seeds))
    if args.demo:
        rows.append(demo_row(workdir, records, args.demo))
    if args.long:
        rows.append(long_row(workdir, records, steps=args.long, fold=FOLDS[0]))
    write_json(args.json, rows)
    print_table(rows)
    print(json.dumps({row.name: row.detail for row in rows}, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)
