"""Benefit of the feature bank: its draws and positives of known purity, compared with no bank.

    python -m benchmarks.bank_benefit --data data/scenes --workdir runs/bank_benefit
    python -m benchmarks.bank_benefit --data data/scenes --workdir runs/bank_benefit --only oracle

Renders videos of 50 classes ("scene": motion, material, and small or large) if DATA does not exist,
trains every variant with every seed for few epochs, and writes the table of `configs/ablation.py`
and `purity.md`: how often sampled rows have the anchor's class. The baseline is without a bank. An
oracle draws its positives by the labels of the records, whatever the embeddings are.
What is finished is not run again, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.evaluation.ablation import FULL, ablate
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import BankSample, DrawnRows
from avcl_jax.objectives.views import Term, Views
from avcl_jax.paths import local_path
from avcl_jax.training import loop
from benchmarks.measure import run_command
from configs import ablation
from data_prep.demo import prepare_rendered
from data_prep.foley import command as foley
from data_prep.foley.scene import RADIUS_PX, draw_scene

CLASS = "scene"
SPLITS = {"train": 4000, "probe": 600, "test": 400}
PURITIES = (0.02, 0.2, 0.35, 0.6, 1.0)  # 0.02 is that of rows at random
WEIGHTS = (0.02, 0.2, 0.5)

_BANK = {"size": 1024, "health_labels": ("motion", "material", CLASS)}


def _variant(weight: float, **bank: Any) -> tuple[tuple[str, object], ...]:
    settings = {f"bank.{name}": value for name, value in (_BANK | bank).items()}
    return tuple({**settings, "loss.positive_weight": weight}.items())


ORACLES: Mapping[str, tuple[float, float]] = {
    f"oracle_{round(100 * purity)}_weight_{weight}": (purity, weight)
    for weight in WEIGHTS
    for purity in PURITIES
}
VARIANTS: Mapping[str, tuple[tuple[str, object], ...]] = {
    **{f"bank_weight_{weight}": _variant(weight) for weight in WEIGHTS},
    **{name: _variant(weight) for name, (_, weight) in ORACLES.items()},
    "positives_only": _variant(0.2, num_negatives=0),
    "negatives_only": _variant(0.0),
    "raw_ranking": _variant(0.2, ranking="raw"),
    "size_256": _variant(0.2, size=256, positive_window=1 / 32),
    "size_4096": _variant(0.2, size=4096, positive_window=1 / 256),
    # A control of the oracles with weight 0.5, whose partners have half the weight.
    "no_bank_half_contrast": (
        ("loss.weights.vv", 0.25),
        ("loss.weights.va", 0.5),
        ("loss.weights.aa", 0.25),
    ),
    "average_of_weights": (*_variant(0.2), ("optimizer.ema_decay", 0.99)),
}
FIGURES = (
    (f"{CLASS}, video", f"probe.{CLASS}_from_video.pretrained", ""),
    (f"{CLASS}, audio", f"probe.{CLASS}_from_audio.pretrained", ""),
    ("motion, video", "probe.motion_from_video.pretrained", ""),
    ("material, audio", "probe.material_from_audio.pretrained", ""),
    ("R@5 audio → video", "retrieval.audio_to_video.r5", ""),
    ("R@5 video → audio", "retrieval.video_to_audio.r5", ""),
    ("speed, video", "temporal.speed_video.accuracy", "speed_video"),
    ("speed, audio", "temporal.speed_audio.accuracy", "speed_audio"),
    ("order, va", "temporal.order_va.accuracy", "order_va"),
)


def make_data(out: Path, *, seed: int = 0, workers: int = 2) -> Path:
    """Renders and prepares the videos that are not there yet; returns the folder of records.

    Args:
        out: For media/ and records/.
        seed: Of every file.
        workers: Processes.
    """
    counts = {"train": SPLITS["train"] + SPLITS["probe"], "test": SPLITS["test"]}
    manifest = foley.write_collection(out / "media", counts, seed=seed, workers=workers)
    table = manifest.with_name("scenes.csv")
    with manifest.open(encoding="utf-8") as read, table.open("w", encoding="utf-8") as written:
        rows = csv.DictReader(read)
        names = [*(rows.fieldnames or ()), f"label_{CLASS}"]
        lines = csv.DictWriter(written, names)
        lines.writeheader()
        for row in rows:
            split, number = row["split"], int(row["id"].rpartition("_")[2])
            large = draw_scene(seed, split, number).radius_px > np.sqrt(np.prod(RADIUS_PX))
            size = "large" if large else "small"
            row[f"label_{CLASS}"] = f"{row['label_motion']}_{row['label_material']}_{size}"
            if split == "train" and number >= SPLITS["train"]:
                row["split"] = "probe"
            lines.writerow(row)
    records = out / "records"
    if status := prepare_rendered(table, records, name="scenes", workers=workers):
        raise SystemExit(status)
    return records


def config_of(
    records: Path, *, steps: int, seeds: Sequence[int], variants: Sequence[str]
) -> ml_collections.ConfigDict:
    """The sweep as `configs/ablation.py` has it; the variant "full" is without a bank."""
    c = ablation.get_config("demo")
    c.unlock()
    c.name = "bank_benefit"
    c.steps = c.execution.checkpoint_every = steps
    c.data.directory = str(records)
    c.bank.size, c.bank.health_labels = 0, ()
    c.bank.warmup_steps = steps // 3
    c.bank.positive_window = 1 / 64
    c.evaluation.train_split = "probe"
    c.evaluation.probes = (
        (CLASS, "video"),
        (CLASS, "audio"),
        ("motion", "video"),
        ("material", "audio"),
    )
    # 50 classes under seven costs and five folds would take longer than the training.
    c.evaluation.probe.costs = (1e-3, 1e-2, 1e-1)
    c.evaluation.probe.folds = 3
    c.evaluation.speeds = (1, 2)
    c.evaluation.pairs_per_video = 4
    c.ablation.seeds = tuple(seeds)
    c.ablation.variants = ((FULL, ()), *((name, VARIANTS[name]) for name in variants))
    c.ablation.metrics = FIGURES
    c.lock()
    return c


def oracle(
    labels: np.ndarray, purity: float, draw: Callable[..., BankSample]
) -> Callable[..., BankSample]:
    """`feature_bank.sample` with positives by label: the anchor's class in a fraction `purity`.

    Every positive is a random row of the anchor's class, or of another class. Negatives are those
    of `draw` but for rows of the positives' sources.

    Args:
        labels: int [sources] class of every source.
        purity: Probability of the anchor's class.
        draw: `feature_bank.sample`.
    """
    classes = jnp.asarray(labels)

    def sample(
        bank: feature_bank.FeatureBank,
        key: jax.Array,
        views: Views,
        *,
        term: Term,
        terms: Sequence[Term],
        active: Any,
        **settings: Any,
    ) -> BankSample:
        drawn = draw(bank, key, views, term=term, terms=terms, active=active, **settings)
        numbers, own = bank.rows.numbers, views.source_id
        key = jax.random.fold_in(key, 1000 + terms.index(term))
        coin_key, noise_key = jax.random.split(key)
        shape = drawn.positives.mask.shape
        eligible = bank.rows.usable(term[1])[None] & (numbers.source_id[None] != own[:, None])
        same = classes[numbers.source_id][None] == classes[own][:, None]
        wanted = jax.random.bernoulli(coin_key, purity, shape)[..., None]
        allowed = eligible[:, None, None] & (same[:, None, None] == wanted)
        noise = jax.random.uniform(noise_key, (*shape, bank.size))
        chosen = jnp.where(allowed, noise, -1).argmax(-1)
        positives = DrawnRows(
            bank.rows.embeddings[term[1]][chosen], allowed.any(-1), numbers[chosen]
        ).where(active)
        sources = positives.numbers.source_id[..., None, :]
        clash = drawn.negatives.numbers.source_id[..., None] == sources
        return BankSample(positives, drawn.negatives.where(~clash.any(-1)))

    return sample


def source_classes(records: RecordDataset) -> np.ndarray:
    """Class of every source, int [sources]."""
    classes = np.full(records.source_numbers.max() + 1, -1)
    classes[records.source_numbers] = records.labels[CLASS]
    return classes


def pretrain(config: ml_collections.ConfigDict, workdir: epath.Path) -> bool:
    """Trains one run, with an oracle if the variant, the name above the run's folder, has one."""
    name = workdir.parent.name
    if name not in ORACLES:
        return loop.pretrain(config, workdir)
    records = RecordDataset(config.data.directory, config.data.split)
    sample = oracle(source_classes(records), ORACLES[name][0], feature_bank.sample)
    with mock.patch.object(feature_bank, "sample", sample):
        return loop.pretrain(config, workdir)


def purity_table(workdir: Path, seeds: Sequence[int]) -> str:
    """Fraction of sampled rows with the anchor's class in %, and the health of embeddings.

    Means over the last fifth of each run's lines of metrics.jsonl, over terms, and over seeds.
    """
    lines = [
        "| variant | positives | negatives | base rate | va negative similarity "
        "| audio spread | video spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (FULL, *VARIANTS):
        paths = [workdir / name / f"seed{seed}/metrics.jsonl" for seed in seeds]
        entries = [
            list(map(json.loads, path.read_text().splitlines())) for path in paths if path.exists()
        ]
        late = [line for run in entries for line in run[-max(len(run) // 5, 1) :]]
        if not late:
            continue

        def mean(ending: str, late: list[dict[str, Any]] = late) -> float:
            values = [v for line in late for k, v in line.items() if k.endswith(ending)]
            return float(np.mean(values)) if values else float("nan")

        shares = (
            mean(f"bank_positive_share/{CLASS}"),
            mean(f"bank_negative_share/{CLASS}"),
            mean(f"base_rate/{CLASS}"),
        )
        health = (
            mean("av/negative_similarity"),
            mean("audio_embedding_std"),
            mean("video_embedding_std"),
        )
        cells = [f"{100 * value:.1f}" for value in shares] + [f"{value:.3f}" for value in health]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |".replace("nan", "–"))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bank_benefit", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--data", type=local_path, default="data/scenes")
    parser.add_argument("--workdir", type=local_path, default="runs/bank_benefit")
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of variants' names")
    args = parser.parse_args(arguments)
    chosen = [name for name in VARIANTS if name.startswith(tuple(args.only or [""]))]
    records = make_data(args.data)
    config = config_of(records, steps=args.steps, seeds=args.seeds, variants=chosen)
    ablate(config, epath.Path(args.workdir), pretrain=pretrain)
    table = purity_table(args.workdir, args.seeds)
    (args.workdir / "purity.md").write_text(table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    run_command(main)
