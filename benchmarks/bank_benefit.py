"""Benefit of the feature bank: its draws, and positives of known purity, compared with no bank.

    python -m benchmarks.bank_benefit --data data/scenes --workdir runs/bank_benefit
    python -m benchmarks.bank_benefit --data data/scenes --workdir runs/bank_benefit --only oracle

Renders videos of 50 classes ("scene": motion, material, and small or large) if DATA does not exist,
trains every variant with every seed for few epochs, and writes the table of `configs/ablation.py`
and `purity.md`, the fraction of sampled rows with the class of the anchor. The baseline has no
bank. An oracle draws its positives by the labels of the records, independent of embeddings.
Finished runs are not repeated, so the command can be interrupted.
"""

from __future__ import annotations

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

from avcl_jax.configs import ablation
from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.demo import prepare_rendered
from avcl_jax.data_prep.foley import command as foley
from avcl_jax.data_prep.foley.scene import RADIUS_PX, draw_scene
from avcl_jax.evaluation.ablation import FULL, ablate
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import BankSample, DrawnRows
from avcl_jax.objectives.views import Term, Views
from avcl_jax.paths import local_path
from avcl_jax.training import loop
from benchmarks.measure import command_parser, run_command

CLASS = "scene"
SPLITS = {"train": 4000, "probe": 600, "test": 400}
PURITIES = (0.02, 0.2, 0.35, 0.6, 1.0)  # 0.02 is chance
WEIGHTS = (0.02, 0.2, 0.5)

_SEED, _WORKERS = 0, 2
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
    # A control of the oracles with weight 0.5, where the weight of the partners is halved.
    "no_bank_half_contrast": tuple(
        {"loss.weights.vv": 0.25, "loss.weights.va": 0.5, "loss.weights.aa": 0.25}.items()
    ),
    "average_of_weights": (*_variant(0.2), ("optimizer.ema_decay", 0.99)),
}
COLUMNS = (
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


def make_data(out: Path) -> Path:
    """Renders and prepares missing videos in OUT/media and returns OUT/records."""
    counts = {"train": SPLITS["train"] + SPLITS["probe"], "test": SPLITS["test"]}
    manifest = foley.write_collection(out / "media", counts, seed=_SEED, workers=_WORKERS)
    table = manifest.with_name("scenes.csv")
    with manifest.open(encoding="utf-8") as read, table.open("w", encoding="utf-8") as written:
        rows = csv.DictReader(read)
        names = [*(rows.fieldnames or ()), f"label_{CLASS}"]
        lines = csv.DictWriter(written, names)
        lines.writeheader()
        for row in rows:
            split, number = row["split"], int(row["id"].rpartition("_")[2])
            large = draw_scene(_SEED, split, number).radius_px > np.sqrt(np.prod(RADIUS_PX))
            size = "large" if large else "small"
            row[f"label_{CLASS}"] = f"{row['label_motion']}_{row['label_material']}_{size}"
            if split == "train" and number >= SPLITS["train"]:
                row["split"] = "probe"
            lines.writerow(row)
    records = out / "records"
    if status := prepare_rendered(table, records, name="scenes", workers=_WORKERS):
        raise SystemExit(status)
    return records


def config_of(
    records: Path, *, steps: int, seeds: Sequence[int], variants: Sequence[str]
) -> ml_collections.ConfigDict:
    """Config of the sweep, like `configs/ablation.py`; the variant "full" has no bank."""
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
    # 50 classes with seven values of C and five folds would take longer than the training.
    c.evaluation.probe.costs = (1e-3, 1e-2, 1e-1)
    c.evaluation.probe.folds = 3
    c.evaluation.speeds = (1, 2)
    c.evaluation.pairs_per_video = 4
    c.ablation.seeds = tuple(seeds)
    c.ablation.variants = ((FULL, ()), *((name, VARIANTS[name]) for name in variants))
    c.ablation.metrics = COLUMNS
    c.lock()
    return c


def oracle(
    labels: np.ndarray, purity: float, draw: Callable[..., BankSample]
) -> Callable[..., BankSample]:
    """`feature_bank.sample` with positives by label.

    Each positive is a random row of the anchor's class or of another class. Negatives are those of
    `draw` without rows of the positives' sources.

    Args:
        labels: int [sources], class of every source.
        purity: probability of the anchor's class.
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
        pure = jax.random.bernoulli(coin_key, purity, shape)[..., None]
        allowed = eligible[:, None, None] & (same[:, None, None] == pure)
        noise = jax.random.uniform(noise_key, (*shape, bank.size))
        positions = jnp.where(allowed, noise, -1).argmax(-1)
        positives = DrawnRows(
            bank.rows.embeddings[term[1]][positions], allowed.any(-1), numbers[positions]
        ).where(active)
        sources = positives.numbers.source_id[..., None, :]
        clash = drawn.negatives.numbers.source_id[..., None] == sources
        return BankSample(positives, drawn.negatives.where(~clash.any(-1)))

    return sample


def source_classes(records: RecordDataset) -> np.ndarray:
    """Returns the class of every source, int [sources]."""
    classes = np.full(records.source_numbers.max() + 1, -1)
    classes[records.source_numbers] = records.labels[CLASS]
    return classes


def pretrain(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Trains one run of WORKDIR/VARIANT/seedN, with the oracle of its variant if there is one."""
    name = workdir.parent.name
    if name not in ORACLES:
        loop.pretrain(config, workdir)
        return
    records = RecordDataset(config.data.directory, config.data.split)
    sample = oracle(source_classes(records), ORACLES[name][0], feature_bank.sample)
    with mock.patch.object(feature_bank, "sample", sample):
        loop.pretrain(config, workdir)


def purity_table(workdir: Path, seeds: Sequence[int]) -> str:
    """Fraction of sampled rows with the anchor's class in %, and the health of embeddings.

    Means over the last fifth of each run's lines of metrics.jsonl, over terms, and over seeds.
    """
    columns = {
        "positives": (f"bank_positive_share/{CLASS}", 100, 1),
        "negatives": (f"bank_negative_share/{CLASS}", 100, 1),
        "base rate": (f"base_rate/{CLASS}", 100, 1),
        "va negative similarity": ("av/negative_similarity", 1, 3),
        "audio spread": ("audio_embedding_std", 1, 3),
        "video spread": ("video_embedding_std", 1, 3),
    }
    lines = [f"| variant | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for name in (FULL, *VARIANTS):
        paths = [workdir / name / f"seed{seed}/metrics.jsonl" for seed in seeds]
        runs = [
            list(map(json.loads, path.read_text().splitlines())) for path in paths if path.exists()
        ]
        late = [line for run in runs for line in run[-max(len(run) // 5, 1) :]]
        cells = []
        for ending, scale, digits in columns.values():
            values = [v for line in late for k, v in line.items() if k.endswith(ending)]
            cells.append(f"{scale * np.mean(values):.{digits}f}" if values else "–")
        if late:
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("bank_benefit", __doc__, json=False)
    parser.add_argument(
        "--data", type=local_path, default="data/scenes", help="videos and records, made if absent"
    )
    parser.add_argument(
        "--workdir", type=local_path, default="runs/bank_benefit", help="directory of all runs"
    )
    parser.add_argument("--steps", type=int, default=750, help="training steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="PREFIX",
        help="variants by the start of their name",
    )
    args = parser.parse_args(arguments)
    variants = [name for name in VARIANTS if name.startswith(tuple(args.only or [""]))]
    records = make_data(args.data)
    config = config_of(records, steps=args.steps, seeds=args.seeds, variants=variants)
    ablate(config, epath.Path(args.workdir), pretrain=pretrain)
    table = purity_table(args.workdir, args.seeds)
    (args.workdir / "purity.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    run_command(main)
