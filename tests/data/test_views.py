"""Views: true labels, balanced labels, and nothing else that tells them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from avcl_jax.data.views import (
    AFTER,
    BACKWARD,
    BEFORE,
    FORWARD,
    MARGIN,
    OVERLAPPING,
    Clip,
    Timeline,
    TooShortError,
    ViewPair,
    ViewSpec,
    draw_views,
    feasible_speeds,
    frame_indices,
)

SHARED = ViewSpec(num_frames=12, clip_seconds=0.75, speeds=(1, 2, 4, 8), audio_transform="shared")
INDEPENDENT = dataclasses.replace(SHARED, audio_transform="independent")
DRAWS = 10_000
COLLECTIONS = {
    "3 s": [(3.0, 1 / 16)],
    "10 s": [(10.0, 1 / 16), (10.0, 1 / 30)],
    "mixed": [(1.0, 1 / 25), (3.0, 1 / 16), (5.0, 1 / 12), (8.0, 1 / 30), (10.0, 1 / 16)],
}


def draws(collection: str, spec: ViewSpec, number: int = DRAWS):
    rng = np.random.default_rng(7)
    for _ in range(number):
        duration, gap = COLLECTIONS[collection][rng.integers(len(COLLECTIONS[collection]))]
        timeline = Timeline(0.3, 0.3 + duration, gap)
        yield timeline, draw_views(rng, timeline, spec)


def interval(clip: Clip, spec: ViewSpec) -> tuple[float, float]:
    return clip.start_seconds, clip.start_seconds + clip.span_seconds(spec)


def relation(first: Clip, second: Clip, spec: ViewSpec) -> int | None:
    """What the two rendered intervals say; None if they keep no margin."""
    (a, b), (c, d) = interval(first, spec), interval(second, spec)
    margin = MARGIN * min(b - a, d - c) - 1e-6
    if c - b >= margin:
        return BEFORE
    if a - d >= margin:
        return AFTER
    return OVERLAPPING if min(b, d) - max(a, c) >= margin else None


@pytest.mark.parametrize("spec", [SHARED, INDEPENDENT], ids=["shared", "independent"])
@pytest.mark.parametrize("collection", COLLECTIONS)
def test_views_lie_inside_and_labels_tell_the_truth(collection, spec):
    for timeline, pair in draws(collection, spec, 3000):
        feasible = feasible_speeds(timeline, spec)
        for clip in (*pair.video, *pair.audio):
            start, end = interval(clip, spec)
            assert start >= timeline.start_seconds - 1e-6
            assert end <= timeline.end_seconds + 1e-6
            assert clip.speed in feasible
        assert pair.speed_mask == (len(feasible) == 4)
        if spec is SHARED:
            assert pair.video == pair.audio
        if pair.order_mask:
            # (v_k, a_k) has no order; all other pairs have the one that is their label.
            for first in (pair.video[0], pair.audio[0]):
                for second in (pair.video[1], pair.audio[1]):
                    assert relation(first, second, spec) == pair.order


def nuisances(timeline: Timeline, pair: ViewPair) -> list[float]:
    return [
        timeline.duration_seconds,
        timeline.max_frame_gap_seconds,
        *(clip.speed for clip in (*pair.video, *pair.audio)),
        *(clip.direction for clip in (*pair.video, *pair.audio)),
    ]


@pytest.mark.parametrize("spec", [SHARED, INDEPENDENT], ids=["shared", "independent"])
@pytest.mark.parametrize("collection", COLLECTIONS)
def test_no_task_is_told_by_speeds_directions_rate_and_duration(collection, spec):
    """Each label's own speed or direction is hidden from the classifier, all else is shown."""
    rows, labels, masks = [], [], []
    for timeline, pair in draws(collection, spec):
        rows.append(nuisances(timeline, pair))
        labels.append([pair.video[0].speed, pair.video[0].direction, pair.order])
        masks.append([pair.speed_mask, pair.direction_mask, pair.order_mask])
    rows, labels, masks = np.array(rows), np.array(labels), np.array(masks)
    for column, (task, classes) in enumerate((("speed", 4), ("direction", 2), ("order", 3))):
        used = masks[:, column]
        assert task == "speed" or used.mean() > 0.05, f"{task} is hardly ever defined"
        if not used.any():
            assert collection == "3 s"
            continue
        shown = rows[used].copy()
        if task == "speed":
            shown[:, [2, 4]] = 0  # that of the view itself, in picture and sound
        elif task == "direction":
            shown[:, [6, 8]] = 0
        label = labels[used, column]
        share = np.bincount(label, minlength=classes) / len(label)
        # Two points over 10,000 draws; where the mask leaves fewer, 4 standard errors.
        allowed = max(0.02, 4 * np.sqrt((1 / classes) * (1 - 1 / classes) / len(label)))
        np.testing.assert_allclose(share, 1 / classes, atol=allowed, err_msg=task)
        half = len(label) // 2
        forest = RandomForestClassifier(40, min_samples_leaf=20, n_jobs=1, random_state=0)
        score = forest.fit(shown[:half], label[:half]).score(shown[half:], label[half:])
        chance_error = 4 * np.sqrt((1 / classes) * (1 - 1 / classes) / (len(label) - half))
        assert score <= 1 / classes + max(0.02, chance_error), (task, score)


def test_the_balance_check_finds_the_draw_that_reads_order_off_the_speeds():
    """The obvious draw, two uniform starts and the label they happen to have, is not balanced."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(2000):
        speeds = rng.integers(4, size=2)
        clips = [
            Clip(rng.uniform(0, 10 - 0.75 * SHARED.speeds[s]), int(s), FORWARD) for s in speeds
        ]
        labels.append(relation(*clips, SHARED))
    share = labels.count(OVERLAPPING) / sum(label is not None for label in labels)
    assert abs(share - 1 / 3) > 0.05


def test_pictures_are_those_on_screen_and_reversed_means_reversed():
    times = np.arange(160) / 16 + 0.01 * np.sin(np.arange(160))
    for speed in range(4):
        clip = Clip(1.23, speed, FORWARD)
        indices = frame_indices(clip, times, SHARED)
        shown = clip.start_seconds + SHARED.speeds[speed] * np.arange(12) / 16
        for index, time in zip(indices, shown, strict=True):
            assert times[index] <= time + 1e-6
            assert times[index + 1] > time + 1e-6
        backward = frame_indices(dataclasses.replace(clip, direction=BACKWARD), times, SHARED)
        np.testing.assert_array_equal(backward, indices[::-1])


@pytest.mark.parametrize("fps", [12.0, 16.0, 24.0, 29.92])
def test_no_feasible_view_shows_a_picture_twice(fps):
    times = np.arange(round(10 * fps)) / fps
    timeline = Timeline(0.0, 10.0, 1 / fps)
    rng = np.random.default_rng(0)
    for _ in range(300):
        for clip in draw_views(rng, timeline, SHARED).video:
            assert len(set(frame_indices(clip, times, SHARED))) == 12
    assert (0 in feasible_speeds(timeline, SHARED)) == (fps >= 16)


def test_too_short_is_one_clear_error():
    with pytest.raises(TooShortError, match=r"0\.75 s at 16 pictures/s fits 0\.500 s"):
        draw_views(np.random.default_rng(0), Timeline(0.0, 0.5, 1 / 16), SHARED)
    with pytest.raises(ValueError, match="increasing"):
        dataclasses.replace(SHARED, speeds=(2, 1))
