"""Alarms about the health of training: rules over the last log lines."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avcl_jax.objectives.views import MODALITIES

Row = Mapping[str, Any]

# Seconds of training between two alarms of a kind.
_PAUSE = 3600.0
_KEPT = 64

# docs/reliability.md, "Alarms", has the curves that these leave room to.
# Embeddings that ran away together when a bank was switched on lost 18 % of their spread in one
# period of 50 steps and 27 % in two; those of healthy runs lose 2 % at most after warm-up.
_FALL, _COMPARED = 0.2, 2
_COLLAPSED = 0.1
# Bank negatives lack the nearest rows, which alone makes a difference of up to 0.05.
_STALE, _STALE_LINES = 0.15, 5
_SPIKE, _SPIKE_DEVIATIONS, _USUAL = 1.25, 6.0, 10
_WAITING, _WAITING_SECONDS, _WAITING_LINES = 0.2, 60.0, 5
_SLOWER = 0.1


class Alarms:
    """Checks every log line, together with those before it."""

    def __init__(self, *, warmup_steps: int = 0):
        """Begins without any line.

        Args:
            warmup_steps: log periods that begin earlier count for the wait for data alone: the
                spread of random encoders falls while the learning rate rises.
        """
        self._warmup_steps = warmup_steps
        self._step = 0
        self._rows: collections.deque[Row] = collections.deque(maxlen=_KEPT)
        self._warm: collections.deque[Row] = collections.deque(maxlen=_KEPT)
        self._sounded: dict[str, float] = {}

    def add(self, row: Row) -> list[str]:
        """Returns an alarm for each rule that the new line, parsed, breaks."""
        self._rows.append(row)
        if self._step >= self._warmup_steps:
            self._warm.append(row)
        self._step = row["step"]
        now = row["train_seconds"]
        alarms = []
        for name, text in self._broken():
            if now - self._sounded.get(name, -_PAUSE) >= _PAUSE:
                self._sounded[name] = now
                alarms.append(f"ALARM at step {self._step}: {text}")
        return alarms

    def _broken(self) -> Iterator[tuple[str, str]]:
        yield from _waits(list(self._rows))
        if self._warm:
            yield from _collapses(list(self._warm))
            yield from _stale_bank(list(self._warm))
            yield from _spikes(list(self._warm))


def _collapses(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields each modality whose embeddings' spread has just fallen, or is nearly 0."""

    def fallen(spread: Sequence[tuple[float, int]]) -> bool:
        return spread[-1][0] < (1 - _FALL) * max(spread)[0]

    advice = (
        "If */negative_similarity in metrics.jsonl rises too, all embeddings move together: if the "
        "feature bank has just been switched on, check its settings (bank.size=0 trains without "
        "it), otherwise lower optimizer.learning_rate"
    )
    for modality in MODALITIES:
        name = f"health/{modality}_embedding_std"
        spread = [(row[name], row["step"]) for row in rows if isinstance(row.get(name), float)]
        if not spread or spread[-1][1] != rows[-1]["step"]:
            continue
        (new, _), thing = spread[-1], f"the spread of the {modality} embeddings ({name})"
        recent = spread[-_COMPARED - 1 :]
        # Of a longer fall the first line is reported.
        if fallen(recent) and not fallen(spread[-_COMPARED - 2 : -1]):
            old, old_step = max(recent)
            yield name, f"{thing} fell from {old:.2f} at step {old_step} to {new:.2f}. {advice}"
        elif new < _COLLAPSED:
            yield name, f"{thing} is {new:.2f}, nearly that of a single point. {advice}"


def _stale_bank(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields a bank whose negatives have been less like the anchors than those of the batch."""
    for name in rows[-1]:
        if not name.endswith("/bank_negative_similarity"):
            continue
        batch = name.replace("bank_", "")
        pairs = [(row.get(name), row.get(batch)) for row in rows[-_STALE_LINES:]]
        if len(pairs) == _STALE_LINES and all(
            isinstance(old, float) and isinstance(new, float) and new - old > _STALE
            for old, new in pairs
        ):
            old, new = pairs[-1]
            yield (
                "bank",
                f"the feature bank is stale: its negatives are less like the anchors ({name} "
                f"{old:.2f}) than those of the batch ({new:.2f}), so embeddings have moved since "
                "its rows were inserted: lower optimizer.learning_rate or bank.size",
            )


def _spikes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields a loss that is far above that of the lines before."""
    losses = [row["loss"] for row in rows[-_USUAL - 1 :]]
    if len(losses) <= _USUAL or not all(isinstance(loss, float) for loss in losses):
        return
    *before, last = losses
    usual = statistics.median(before)
    deviation = statistics.median(abs(loss - usual) for loss in before)
    if last > max(_SPIKE * usual, usual + _SPIKE_DEVIATIONS * deviation):
        yield (
            "loss",
            f"the loss rose to {last:.2f}, and its median over the {_USUAL} log lines before was "
            f"{usual:.2f}: if it stays there, lower optimizer.learning_rate or optimizer.clip_norm",
        )


def _waits(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields a run that waits for data, and the process that all others wait for."""
    last = rows[-1]
    for lines in range(_WAITING_LINES, len(rows)):
        seconds = last["train_seconds"] - rows[-lines - 1]["train_seconds"]
        if seconds >= _WAITING_SECONDS:
            break
    else:
        return
    recent = rows[-lines:]
    share = statistics.fmean(row["data_wait_share"] for row in recent)
    slowest = ""
    if all(len(row.get("hosts", ())) == len(last.get("hosts", ())) > 1 for row in recent):
        hosts = [
            statistics.fmean(row["hosts"][number]["data_wait_share"] for row in recent)
            for number in range(len(last["hosts"]))
        ]
        share = max(hosts)
        number = hosts.index(share)
        others = statistics.median(hosts[:number] + hosts[number + 1 :])
        if share - others > _SLOWER:
            slowest = (
                f"; process {number} on {last['hosts'][number]['host']} is the slowest, the others "
                f"wait {100 * others:.0f} %"
            )
    if share > _WAITING or slowest:
        yield (
            "data",
            f"training has waited for data {100 * share:.0f} % of the last {seconds:.0f} s"
            f"{slowest}: raise execution.workers, or see docs/data/pipeline_speed.md",
        )
