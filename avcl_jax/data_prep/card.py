"""`avcl-data inspect PATH`: a card of a prepared data set, as text and as an image."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.records import Record, RecordDataset, split_names
from avcl_jax.data.spectrogram import mel_decibels
from avcl_jax.data_prep.clip import NOTES
from avcl_jax.data_prep.manifest import COUNT, NATURAL
from avcl_jax.data_prep.publish import PREPARATION
from avcl_jax.paths import absolute_path

_MOST_CLASSES = 20
_STILLS = 4
_BLUE, _ORANGE = "#3a86d4", "#d97a1a"
_BARS = 24  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("path", type=absolute_path, help="directory of a prepared data set")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--png", type=absolute_path, help="the image; PATH/card.png if not given")
    parser.add_argument("--rows", type=COUNT, default=8, help="clips in the image, of each split")
    parser.add_argument("--seed", type=NATURAL, default=0, help="seed of the choice of clips")


def run(args: argparse.Namespace) -> int:
    """Prints the card and writes the image; returns the exit status."""
    png = args.png or args.path / "card.png"
    names = [args.split] if args.split else split_names(args.path)
    splits = [RecordDataset(args.path, name) for name in names]
    for dataset in splits:
        print("\n".join(describe(dataset)))
        if (path := args.path / PREPARATION).exists():  # else written by another program
            counts = json.loads(path.read_text())["splits"][dataset.split]
            for kind, count in counts.get("notes", {}).items():  # earlier releases have none
                print(f"  note       {count} {kind}: {NOTES[kind]}")
    figure = draw(splits, rows=args.rows, seed=args.seed)
    with png.open("wb") as file:
        figure.savefig(file, format="png", dpi=80)
    print(f"image {png}")
    return 0


def _class_counts(dataset: RecordDataset, label: str) -> tuple[list[tuple[str, int]], int]:
    """Returns clips of each class, most frequent first, and clips of no known class."""
    numbers, unlabelled = dataset.class_numbers(label)
    counts = np.bincount(numbers, minlength=len(dataset.class_names[label]))
    order = np.argsort(-counts, kind="stable")
    return [(dataset.class_names[label][n], int(counts[n])) for n in order], unlabelled


def _range(values: np.ndarray, unit: str) -> str:
    """Returns "smallest / middle / largest unit"."""
    if not len(values):
        return "none"
    quantiles = (values.min(), np.median(values), values.max())
    return " / ".join(f"{value:.4g}" for value in quantiles) + f" {unit}"


def describe(dataset: RecordDataset) -> list[str]:
    """Returns the lines of one split's card."""
    times, seconds = dataset.timelines, dataset.timelines["duration_seconds"]
    frames, audio = times["num_frames"], times["num_samples"] > 0
    several = frames > 1
    span = (times["last_frame_seconds"] - times["first_frame_seconds"])[several]
    fps = _range((frames[several] - 1) / span, "frames per second")
    rates = ", ".join(map(str, sorted(set(times["sample_rate_hz"][audio].tolist())))) or "no"
    per_hour = dataset.num_bytes / seconds.sum() * 3600 / 1e6
    lines = [
        dataset.fingerprint,
        f"  clips      {len(dataset)}, of {len(np.unique(dataset.source_numbers))} sources",
        f"  hours      {seconds.sum() / 3600:.2f}",
        f"  bytes      {dataset.num_bytes / 1e6:.1f} MB, {per_hour:.0f} MB per hour",
        f"  video      {int((frames > 0).sum())} clips; {fps}",
        f"  audio      {int(audio.sum())} clips; {rates} Hz",
        f"  length     {_range(seconds, 's')}  (smallest / middle / largest)",
    ]
    for label in sorted(dataset.class_names):
        counts, unlabelled = _class_counts(dataset, label)
        many = ", several per clip" if label in dataset.multilabel else ""
        unknown = f", {unlabelled} clips without" if unlabelled else ""
        lines.append(f"  label      {label}: {len(counts)} classes{many}{unknown}")
        most = max(counts[0][1], 1) if counts else 1
        for name, count in counts[:_MOST_CLASSES]:
            lines.append(f"    {name[:30]:<30}{count:>9}  {'█' * round(_BARS * count / most)}")
        if len(counts) > _MOST_CLASSES:
            rest = sum(count for _, count in counts[_MOST_CLASSES:])
            lines.append(f"    {len(counts) - _MOST_CLASSES} more classes {rest:>18}")
    return lines


def _draw_classes(axes: Axes, dataset: RecordDataset, label: str) -> None:
    counts, _ = _class_counts(dataset, label)
    bars = counts[:_MOST_CLASSES][::-1]
    axes.barh([name[:24] for name, _ in bars], [count for _, count in bars], color=_ORANGE)
    more = f" ({_MOST_CLASSES} of {len(counts)})" if len(counts) > _MOST_CLASSES else ""
    axes.set_title(f"{label}{more}", loc="left", fontsize=10)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("clips")


def _draw_clip(axes: Sequence[Axes], record: Record, dataset: RecordDataset) -> None:
    """Draws frames and the spectrogram of a clip into one row."""

    def caption(place: Axes, text: str) -> None:
        place.set_xlabel(text, fontsize=7, labelpad=2)

    for one in axes:
        one.set_xticks([])
        one.set_yticks([])
        one.set_facecolor("#eeeeee")
    numbers = np.linspace(0, len(record.frames) - 1, _STILLS).round().astype(int)
    for place, number in zip(axes, numbers if record.has_video else (), strict=False):
        place.imshow(decode_jpegs([record.frames[number]])[0])
        caption(place, f"{record.frame_seconds[number]:.2f} s")
    if not record.has_video:
        caption(axes[0], "no video")
    if record.has_audio:
        window = min(2048, len(record.waveform))
        decibels = mel_decibels(
            record.waveform, record.sample_rate_hz, window=window, hop=512, mels=64
        )
        end = record.audio_start_seconds + len(record.waveform) / record.sample_rate_hz
        axes[-1].imshow(
            decibels.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-80,
            vmax=20,
            extent=(record.audio_start_seconds, end, 0, 1),
        )
        axes[-1].set_xlim(0, record.duration_seconds)
    caption(axes[-1], f"0 to {record.duration_seconds:.2f} s" if record.has_audio else "no audio")
    names = [
        f"{label}: {dataset.class_names[label][number]}"
        for label, classes in record.labels.items()
        for number in (classes if isinstance(classes, tuple) else (classes,))
        if number >= 0
    ]
    title = "   ".join([record.record_id.encode("unicode_escape").decode(), *names])
    axes[0].set_title(title[:110].replace("$", r"\$"), loc="left", fontsize=8)


def draw(splits: Sequence[RecordDataset], *, rows: int, seed: int) -> Figure:
    """Draws lengths, classes, and `rows` random clips of each split of a data set."""
    labels = sorted(splits[0].class_names)[:3]
    sheets = [min(rows, len(dataset)) for dataset in splits]
    figure = Figure(figsize=(12, 2.6 * len(splits) + 1.45 * sum(sheets)), layout="constrained")
    heights = [height for n in sheets for height in (2.6, max(1.45 * n, 0.1))]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    for number, dataset in enumerate(splits):
        axes = parts[2 * number].subplots(1, 1 + len(labels), squeeze=False)[0]
        axes[0].hist(dataset.timelines["duration_seconds"], bins=30, color=_BLUE)
        axes[0].set_title(f"{dataset.split}: {len(dataset)} clips", loc="left", fontsize=10)
        axes[0].set_xlabel("seconds")
        axes[0].set_ylabel("clips")
        for place, label in zip(axes[1:], labels, strict=True):
            _draw_classes(place, dataset, label)
        grid = parts[2 * number + 1].subplots(
            sheets[number], _STILLS + 1, squeeze=False, width_ratios=[1] * _STILLS + [2]
        )
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(len(dataset), sheets[number], replace=False))
        for row, index in zip(grid, chosen, strict=True):
            _draw_clip(row, dataset[int(index)], dataset)
    return figure
