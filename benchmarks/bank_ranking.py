"""Agreement of the feature bank's nearest rows with their anchors, for each ranking.

    python -m benchmarks.bank_ranking runs/demo runs/seed1 runs/seed2 --json F

Every row of a run's bank is an anchor once. A figure is the fraction of its nearest rows of other
sources (the run's `bank.positive_window`), or of all rows, that have its speed, direction or label.
"raw" and "content" are those of `bank.ranking`; "playback" only ranks rows of equal playback.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from avcl_jax import experiment
from avcl_jax.export.runs import load_run
from avcl_jax.objectives.bank_rows import BankRows
from avcl_jax.objectives.views import Term
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import load_bank
from benchmarks.measure import Row, print_table, run_command, writable_path, write_json

RANKINGS = ("raw", "content", "playback")


def similarities(bank: BankRows, pairs: Sequence[Term], ranking: str) -> np.ndarray:
    """Similarity [rows, rows] of anchors and rows, −inf where a row is not eligible.

    Args:
        bank: rows of a bank, numpy arrays.
        pairs: modalities of anchor and row, over whose similarities the minimum is taken.
        ranking: one of `RANKINGS`.
    """
    numbers = bank.numbers
    eligible = numbers.source_id[:, None] != numbers.source_id[None]
    by_pair = []
    for own, row in pairs:
        query, rows = (bank.embeddings[m].astype(np.float64) for m in (own, row))
        present, playback = bank.usable(row), numbers.playback(row)
        eligible &= bank.usable(own)[:, None] & present[None]
        if ranking == "playback":
            eligible &= numbers.playback(own)[:, None] == playback[None]
        if ranking == "content":
            of_playback = (playback[:, None] == playback[None]) & present[None]
            mean = of_playback @ rows / np.maximum(of_playback.sum(axis=1, keepdims=True), 1)
            rows = rows - mean
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)
            query = rows if own == row else query
        by_pair.append(query @ rows.T)
    return np.where(eligible, np.min(by_pair, axis=0), -np.inf)


def agreement(
    bank: BankRows, names: Sequence[str], config: ml_collections.ConfigDict
) -> dict[str, dict[str, float]]:
    """Fraction of the nearest rows that agree with their anchor.

    Args:
        bank: rows of a bank, numpy arrays.
        names: names of the labels.
        config: config of the run.

    Returns:
        Ranking, or "all rows" → label, "speed" or "direction" → fraction.
    """
    sampling = experiment.bank_sampling(config)
    pairs = sampling.pairs("audio" if config.modalities == "audio" else "video")
    kinds = {name: bank.numbers.label[:, k] for k, name in enumerate(names)}
    playback = bank.numbers.playback(pairs[0][1])
    kinds |= {"speed": playback // 2, "direction": playback % 2}
    fractions: dict[str, dict[str, float]] = defaultdict(dict)
    for ranking in RANKINGS:
        scores = similarities(bank, pairs, ranking)
        order = np.argsort(-scores, axis=1)[:, : sampling.positive_ranks]
        counts = np.take_along_axis(scores, order, axis=1) > -np.inf
        for kind, values in kinds.items():
            fractions[ranking][kind] = float((values[order] == values[:, None])[counts].mean())
    eligible = similarities(bank, pairs, "raw") > -np.inf
    for kind, values in kinds.items():
        fractions["all rows"][kind] = float((values[:, None] == values[None])[eligible].mean())
    return fractions


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bank_ranking", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=absolute_path, help="workdirs, one for each seed")
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    args = parser.parse_args(arguments)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in args.runs:
        config, _, _ = load_run(run)
        by_ranking: Any = agreement(load_bank(run).rows, config.bank.health_labels, config)
        for ranking, fractions in by_ranking.items():
            for kind, fraction in fractions.items():
                values[kind, ranking].append(fraction)
    rows = [
        Row(f"{kind}_{ranking.replace(' ', '_')}", float(np.mean(v)), "share", None, {"runs": v})
        for (kind, ranking), v in sorted(values.items())
    ]
    write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    run_command(main)
