"""The same views of a record each time, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from avcl_jax.data.crop import center_crop
from avcl_jax.data.modality_records import evenly_spaced
from avcl_jax.data.rendering import RenderSpec, describe, render_views
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import Clip, Timeline, ViewSpec, feasible_speeds


def fitting_speed(timeline: Timeline, wanted: int, views: ViewSpec) -> int:
    """Returns the index of the feasible speed that is nearest to the one at `wanted`."""
    feasible = feasible_speeds(timeline, views)
    return min(feasible, key=lambda speed: abs(speed - wanted))


def fixed_views(
    source: UsableRecords,
    position: int,
    spec: RenderSpec,
    *,
    speeds: Sequence[int],
    views_per_speed: int,
    direction: int,
) -> dict[str, Any]:
    """Uniformly spaced centre-crop views of one record, for evaluation.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.
        speeds: indices into `spec.views.speeds`; one that is too fast for the record falls back
            to the fastest that fits.
        views_per_speed: clips at each speed, from the first possible start to the last.
        direction: `FORWARD` or `BACKWARD`.

    Returns:
        As `render_views`, plus `describe`, with len(speeds) * views_per_speed views.
    """
    index, record, use = source[position]
    clips = []
    for speed in (fitting_speed(use.timeline, wanted, spec.views) for wanted in speeds):
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.timeline.duration_seconds - span, 0.0)
        first = use.timeline.start_seconds
        clips += [
            Clip(start, speed, direction)
            for start in evenly_spaced(first, first + slack, views_per_speed)
        ]
    crop = center_crop(max(record.height, 1), max(record.width, 1))
    arrays = render_views(record, use, clips, clips, [crop] * len(clips), spec)
    # Views of a record are averaged, so that it has audio even if some of them are silent.
    arrays["has_audio"] = np.bool_(use.has_audio)
    return arrays | describe(index, record, source.records)
