"""Accuracy of encoders on real recordings: ESC-10, pretrained on the training folds alone.

    avcl-data esc50 ../shared/data/esc10 --subset esc10 --name esc10 --out data/esc10
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/esc10 --json esc10.json
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/esc10 --json esc10.json \\
        --demo runs/demo --long 20000
    python -m benchmarks.esc10 --records data/esc10 --workdir runs/no_bank --json no_bank.json \\
        --config.bank.size=0

For every seed and official fold a run of `configs/pretrain.py:esc10` on the other four folds, then
`configs/linear_probe.py:esc10` on all five: encoder and classifier of a file were trained without
it. A random encoder and classical features are tested on the same files.
With every file as its own class: R@1 of the last view of a file, by the first view, among those of
all 400 files, by the embedding and by the mean level alone, with an encoder trained without it.
Finished runs are not repeated, so the command can be interrupted. `--config.NAME` changes a
setting of every pretraining run.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.configs import pretrain as pretrain_config
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.evaluation.views import PretrainedRun
from avcl_jax.paths import local_path
from benchmarks import measure
from benchmarks.audio_settings import other_view_hits
from benchmarks.measure import Row, Target

FOLDS = ("1", "2", "3", "4", "5")
# Accuracy of an RBF SVM on log-mel statistics of the same files.
CLASSICAL = 0.815


def pretrain(workdir: Path, records: Path, *, fold: str, seed: int, options: Sequence[str]) -> None:
    """Trains on all folds but one, unless the run is finished."""
    select = f"--config.data.select=fold!={fold}"
    _main("pretrain", workdir, records, select, f"--config.seed={seed}", *options)


def classify(
    workdir: Path, records: Path, *, encoder: str, seed: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the protocol for an encoder, or for one per fold, and returns its results."""
    settings = (f"--config.encoder={encoder}", f"--config.seed={seed}")
    _main("linear_probe", workdir, records, *settings, *options)
    return json.loads((workdir / "results.json").read_text())


def _main(config: str, workdir: Path, records: Path, *options: str) -> None:
    command = ["-m", "avcl_jax.main", f"--config=configs/{config}.py:esc10"]
    command += [f"--workdir={workdir}", f"--config.data.directory={records}", *options]
    print(*command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def _accuracy(results: Mapping[str, Any], name: str = "top1") -> float:
    return results["metrics"][name]["value"]


def _interval(results: Mapping[str, Any]) -> list[float]:
    return [results["metrics"]["top1"][end] for end in ("low", "high")]


def _by_fold(results: Mapping[str, Any]) -> list[float]:
    return [split["chosen"]["encoder"]["top1"] for split in results["details"]["splits"]]


def _minutes(workdir: Path) -> float:
    """Training time up to the newest checkpoint of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train_seconds"] for line in lines if "train_seconds" in line][-1] / 60


def folds_rows(
    workdir: Path, records: Path, seeds: Sequence[int], *, options: Sequence[str] = ()
) -> list[Row]:
    """Pretrains for every fold and seed, and classifies.

    Args:
        workdir: directory of all runs.
        records: prepared ESC-10.
        seeds: seeds of pretraining.
        options: settings of pretraining, --config.NAME=VALUE.
    """
    runs = {
        (seed, fold): workdir / f"seed{seed}/fold{fold}"
        for seed, fold in itertools.product(seeds, FOLDS)
    }
    for (seed, fold), run in runs.items():
        pretrain(run, records, fold=fold, seed=seed, options=options)
    results = []
    for seed in seeds:
        place = workdir / f"seed{seed}"
        encoder = f"{place}/fold{{fold}}"
        results.append(classify(place / "classified", records, encoder=encoder, seed=seed))
    accuracies = list(map(_accuracy, results))
    randoms = [_accuracy(result, "top1_random") for result in results]
    gains = [a - b for a, b in zip(accuracies, randoms, strict=True)]
    classical = {
        name: _accuracy(results[0], f"top1_{name}")
        for name in ("mfcc_rbf", "log_mel_rbf", "log_mel_linear")
    }
    minutes = list(map(_minutes, runs.values()))
    detail = {
        "by_seed": accuracies,
        "intervals": list(map(_interval, results)),
        "by_fold": list(map(_by_fold, results)),
        "random": randoms,
        "classical": classical,
        "options": list(options),
    }
    mean, of_minutes = statistics.mean(accuracies), measure.spread(minutes)
    over_classical = mean - max(classical.values())
    over_random = statistics.mean(gains)
    return [
        Row("esc10_accuracy", mean, "fraction", Target(">=", CLASSICAL), detail),
        Row("esc10_over_random", over_random, "fraction", Target(">=", 0.10), {"gains": gains}),
        Row("esc10_over_classical", over_classical, "fraction", Target(">=", 0.0), classical),
        Row("esc10_pretraining_minutes", max(minutes), "min", Target("<=", 8), of_minutes),
    ]


def demo_row(workdir: Path, records: Path, demo: Path) -> Row:
    """Accuracy of the demo's audio encoder, which was trained on rendered audio alone."""
    results = classify(workdir / "demo", records, encoder=str(demo), seed=0)
    detail = {"interval": _interval(results), "encoder": results["encoder"]}
    return Row("esc10_demo_encoder", _accuracy(results), "fraction", detail=detail)


def own_file_row(workdir: Path, records: Path, seeds: Sequence[int]) -> Row:
    """R@1 of the other view of the same file among all files, for files outside the training."""
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
            for name, of_files in other_view_hits(run, usable).items():
                hits.setdefault(name, []).append(of_files[tested])
        for name, parts in hits.items():
            by_seed.setdefault(name, []).append(float(np.concatenate(parts).mean()))
    value = statistics.mean(by_seed["other_view"])
    return Row("esc10_own_file", value, "fraction", detail=by_seed | {"chance": chance})


def long_row(workdir: Path, records: Path, *, steps: int, fold: str) -> Row:
    """One longer pretraining and the usual one of the same seed, tested on their fold alone."""
    place = workdir / f"long{steps}"

    def accuracy(run: Path, classified: str, *options: str) -> float:
        pretrain(run, records, fold=fold, seed=0, options=options)
        # The results of the other folds, on which the encoder was trained, are not used.
        allow = ("--config.data.allow_trained_on=True",)
        results = classify(place / classified, records, encoder=str(run), seed=0, options=allow)
        return _by_fold(results)[FOLDS.index(fold)]

    run = place / f"fold{fold}"
    value = accuracy(
        run,
        "classified",
        f"--config.steps={steps}",
        f"--config.bank.warmup_steps={round(0.6 * steps)}",
        f"--config.execution.checkpoint_every={max(steps // 20, 1)}",
    )
    usual = accuracy(workdir / f"seed0/fold{fold}", "classified_usual")
    detail = {"fold": fold, "steps": steps, "minutes": _minutes(run), "of_usual_length": usual}
    return Row("esc10_long", value, "fraction", detail=detail)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("esc10", __doc__)
    parser.add_argument(
        "--records", type=local_path, default="data/esc10", help="prepared ESC-10 (%(default)s)"
    )
    parser.add_argument(
        "--workdir", type=local_path, default="runs/esc10", help="directory of all runs"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        default=[0, 1, 2],
        help="seeds of pretraining; empty for --demo and --long alone",
    )
    parser.add_argument("--demo", type=local_path, help="run of the demo, to test its encoder too")
    parser.add_argument("--long", type=int, metavar="STEPS", help="one longer run, on fold 1")
    args, options = measure.parse_with_overrides(parser, arguments)
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
    measure.report(args.json, rows)
    print(json.dumps({row.name: row.detail for row in rows}, indent=1))


if __name__ == "__main__":
    measure.run_command(main)
