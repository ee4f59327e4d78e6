"""What a preparation prints when it ends."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from data_prep.clip import NOTES, REASONS
from data_prep.earlier import SOURCES
from data_prep.manifest import Manifest
from data_prep.source_files import Duplicate


def print_plan(out: epath.Path, manifest: Manifest) -> None:
    """Says what a run would prepare."""
    clips = collections.Counter(entry.split for entry in manifest.entries)
    missing = collections.Counter(clip.split for clip in manifest.missing)
    print(f"{'split':<12}{'clips':>9}{'missing':>9}")
    for split in clips | missing:
        print(f"{split:<12}{clips[split]:>9}{missing[split]:>9}")
    for label, names in manifest.class_names.items():
        several = ", several a clip" if label in manifest.multilabel else ""
        print(f"  label {label}: {len(names)} classes{several}")
    print(f"nothing was written to {out} (--dry-run)")


def print_table(
    out: epath.Path,
    splits: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
    duplicates: Sequence[Duplicate],
    *,
    dropped: bool,
    seconds: float,
) -> None:
    """Says what was prepared, what was not and why, and how long it took.

    Args:
      out: Directory of the data set.
      splits: Counts of each split that was prepared.
      manifest: What was asked for.
      duplicates: Clips of the same content.
      dropped: They were left out.
      seconds: Since the command started.
    """
    columns = ("records", "rejected", "no audio", "no video", "hours", "MB", "source MB")
    print(f"{'split':<12}" + "".join(f"{name:>10}" for name in columns))
    for split, counts in splits.items():
        print(
            f"{split:<12}{counts['records']:>10}{sum(counts['rejected'].values()):>10}"
            f"{counts['no_sound']:>10}{counts['no_picture']:>10}{counts['hours']:>10.2f}"
            f"{counts['bytes'] / 1e6:>10.1f}{counts['source_bytes'] / 1e6:>10.1f}"
        )
    reasons: collections.Counter[str] = collections.Counter()
    notes: collections.Counter[str] = collections.Counter()
    for counts in splits.values():
        reasons.update(counts["rejected"])
        notes.update(counts["notes"])
    for reason, number in reasons.most_common():
        print(f"  {number} {reason}: {REASONS[reason]}")
    if reasons:
        print(f"  each file and what was found: {out}/rejected.jsonl")
    for kind, number in notes.most_common():
        print(f"  {number} prepared, but {kind}: {NOTES[kind]}")
    if notes:
        print(f"  each file and what was found: notes in {out}/{SOURCES}")
    if manifest.missing:
        listed = len(manifest.missing) + len(manifest.entries)
        print(
            f"  {len(manifest.missing)} of {listed} listed clips are not there: {out}/missing.jsonl"
        )
    if duplicates:
        what = "were left out" if dropped else "are there; --deduplicate leaves them out"
        print(f"  {len(duplicates)} exact duplicates of other clips {what}: {out}/duplicates.jsonl")
    if manifest.ignored:
        print(f"  {manifest.ignored} files ignored: nothing asked for them")
    print(f"{out}: {seconds:.1f} s")
