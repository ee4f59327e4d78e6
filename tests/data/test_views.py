"""Views: true and balanced labels, and no other cue that reveals them."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from avcl_jax.data.media import RateLimit
from avcl_jax.data.views import (
    AFTER,
    BACKWARD,
    BEFORE,
    FORWARD,
    MARGIN,
    OVERLAPPING,
    Clip,
    Timeline,
    ViewPair,
    ViewSpec,
    clip_times,
    draw_views,
    feasible_speeds,
    frame_indices,
    order_fits,
    views_fit,
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
        times = 0.3 + gap * np.arange(round(duration / gap))
        yield timeline, draw_views(rng, timeline, spec, times)


def interval(clip: Clip, spec: ViewSpec) -> tuple[float, float]:
    return clip.start_seconds, clip.start_seconds + spec.clip_seconds * spec.speeds[clip.speed]


def relation(first: Clip, second: Clip, spec: ViewSpec) -> int | None:
    """Order of the two rendered intervals; None if they keep no margin."""
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
        timeline.frame_gap_seconds,
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


@pytest.mark.parametrize("order", [BEFORE, OVERLAPPING, AFTER])
def test_views_of_every_order_lie_anywhere_in_the_video(order):
    """Reversed in time, the places of an order are those of its opposite."""
    pairs = [pair for _, pair in draws("10 s", SHARED, 6000) if pair.order_mask]
    ends = np.array(
        [[interval(clip, SHARED) for clip in p.video] for p in pairs if p.order == order]
    )
    opposite = {BEFORE: AFTER, AFTER: BEFORE, OVERLAPPING: OVERLAPPING}[order]
    others = [[interval(clip, SHARED) for clip in p.video] for p in pairs if p.order == opposite]
    middles, reversed_middles = ends.mean(axis=2), 10.6 - np.array(others).mean(axis=2)
    error = np.sqrt(middles.var(axis=0) / len(middles) + reversed_middles.var(axis=0) / len(others))
    assert (np.abs(middles.mean(axis=0) - reversed_middles.mean(axis=0)) < 4 * error).all()
    assert ends.min() < 0.4
    assert ends.max() > 10.2


@pytest.mark.parametrize(("fps", "jitter"), [(16, 0), (32, 0), (32, 0.004), (48, 0)])
def test_frames_of_a_multiple_of_the_clip_rate_are_those_on_screen(fps, jitter):
    """Each began at or before its time and the next after it; reversed means reversed."""
    times = constant(fps) + jitter * np.sin(np.arange(10 * fps))
    for speed in range(4):
        for start in np.random.default_rng(speed).uniform(0.1, 10 - 6, 50).tolist():
            clip = Clip(start, speed, FORWARD)
            indices = frame_indices(clip, times, SHARED)
            shown = start + SHARED.speeds[speed] / 16 * np.arange(12)
            assert (times[indices] <= shown + 1e-6).all()
            assert (np.append(times, np.inf)[indices + 1] > shown + 1e-6).all()
            backward = frame_indices(dataclasses.replace(clip, direction=BACKWARD), times, SHARED)
            np.testing.assert_array_equal(backward, indices[::-1])


@pytest.mark.parametrize("fps", [5.0, 16.0, 24.0, 29.92])
def test_no_feasible_view_shows_a_picture_twice(fps):
    times = np.arange(round(10 * fps)) / fps
    timeline = Timeline(0.0, 10.0, 1 / fps)
    rng = np.random.default_rng(0)
    for _ in range(300):
        for clip in draw_views(rng, timeline, SHARED, times).video:
            assert len(set(frame_indices(clip, times, SHARED))) == 12
    assert (0 in feasible_speeds(timeline, SHARED)) == (fps >= 16)


def constant(fps: float, seconds: float = 10.0) -> np.ndarray:
    return np.arange(round(seconds * fps)) / fps


def lost(fps: float, *numbers: int) -> np.ndarray:
    return np.delete(constant(fps), numbers)


def limited(fps: float, max_fps: float) -> np.ndarray:
    limit = RateLimit(max_fps)
    return np.array([time for time in constant(fps).tolist() if limit.keeps(time)])


def timeline_of(times: np.ndarray) -> Timeline:
    gap = float(times[-1] - times[0]) / (len(times) - 1)
    return Timeline(float(times[0]), float(times[-1]) + gap, gap)


# A frame or some are missing, or time stamps are rounded to milliseconds as in Matroska.
ALMOST = {
    "16 fps, one lost": lost(16, 80),
    "16 fps, three lost together": lost(16, 80, 81, 82),
    "16 fps, two lost": lost(16, 40, 100),
    "30 fps, one lost": lost(30, 150),
    "30 fps, 0.4 s lost": lost(30, *range(150, 162)),
    "16 fps in milliseconds": constant(16).round(3),
    "30 fps, at most 20": limited(30, 20),
    "16 fps, half a second lost": lost(16, *range(32, 40)),
}
FAST = {f"{fps} fps": constant(fps) for fps in (20, 24, 25, 30000 / 1001, 30, 50, 60)}
SLOW = {
    **{f"{fps} fps": constant(fps) for fps in (15.4, 15000 / 1001, 15, 12.5, 11.2, 10, 8, 7.5)},
    "15 fps in milliseconds": constant(15).round(3),
    "15 fps, two lost": lost(15, 30, 90),
    "12.5 fps, one lost": lost(12.5, 60),
    "30 fps, at most 16": limited(30, 16),
    "25 fps, at most 16": limited(25, 16),
    "16 fps, one of 20 lost": lost(16, *range(10, 160, 20)),
}
LONG = ViewSpec(num_frames=16, clip_seconds=1.0, speeds=(1, 2, 4, 8), audio_transform="shared")
ODD = dataclasses.replace(SHARED, num_frames=11, clip_seconds=0.6875)


@pytest.mark.parametrize("name", ALMOST)
def test_videos_with_lost_frames_stay_in_the_speed_task(name):
    """The draw is that of the file without the loss, and no view shows a frame twice."""
    times, whole = ALMOST[name], constant(30 if name.startswith("30") else 16)
    assert np.diff(times).max() > SHARED.frame_seconds
    speeds = []
    for seed in range(1000):
        pair = draw_views(np.random.default_rng(seed), timeline_of(times), SHARED, times)
        same = draw_views(np.random.default_rng(seed), timeline_of(whole), SHARED, whole)
        for clip, expected in zip(pair.video, same.video, strict=True):
            assert (clip.speed, clip.direction) == (expected.speed, expected.direction)
        assert pair.order_mask == same.order_mask
        if pair.order_mask:
            assert pair.order == same.order == relation(*pair.video, SHARED)
        assert pair.direction_mask
        assert pair.speed_mask
        for clip in pair.video:
            speeds.append(clip.speed)
            assert (np.diff(frame_indices(clip, times, SHARED)) != 0).all()
    allowed = 4 * np.sqrt(0.25 * 0.75 / len(speeds))
    np.testing.assert_allclose(np.bincount(speeds) / len(speeds), 0.25, atol=allowed)


@pytest.mark.parametrize(
    "times",
    [
        lost(30, *range(120, 180)),
        np.concatenate([np.arange(75) / 30, 2.5 + np.arange(50) / 20, 5 + np.arange(50) / 10]),
        np.concatenate([np.arange(150) / 30, 5 + np.arange(130) / 26]),
        np.cumsum(np.random.default_rng(0).exponential(0.07, 140)),
        constant(6),
        constant(11.65, 6.0),  # 8 x 9 frames from the first to the last of a view do not fit
    ],
    ids=["a gap of 2 s", "three rates", "two rates", "any rate", "6 fps", "too few frames"],
)
def test_a_file_on_which_speeds_would_differ_is_never_in_the_speed_task(times):
    rng = np.random.default_rng(0)
    for _ in range(200):
        pair = draw_views(rng, timeline_of(times), SHARED, times)
        assert not pair.speed_mask
        assert pair.direction_mask


@pytest.mark.parametrize("spec", [SHARED, LONG, ODD], ids=["12", "16", "11 frames"])
@pytest.mark.parametrize("name", SLOW | FAST)
def test_steps_between_frames_are_alike_at_every_speed_and_in_both_directions(name, spec):
    times = (SLOW | FAST)[name]
    timeline = timeline_of(times)
    tolerance = 1.0 if name.endswith("fps") else 2.0
    patterns, directions = set(), set()
    for seed in range(100):
        pair = draw_views(np.random.default_rng(seed), timeline, spec, times)
        assert pair.speed_mask
        for clip in pair.video:
            speed = spec.speeds[clip.speed]
            indices = frame_indices(clip, times, spec)
            assert ((indices >= 0) & (indices < len(times))).all()
            steps = np.diff(indices) // speed
            np.testing.assert_array_equal(steps * speed, np.diff(indices))
            patterns.add((clip.speed, tuple(np.abs(steps))))
            directions.add((clip.direction, tuple(steps == 0)))
            forward = indices[::-1] if clip.direction == BACKWARD else indices
            wanted = clip.start_seconds + speed * spec.frame_seconds * np.arange(spec.num_frames)
            error = np.abs(times[forward] - wanted).max() / speed
            assert error <= tolerance * timeline.frame_gap_seconds + 1e-6
    (pattern,) = {pattern for _, pattern in patterns}
    assert len(patterns) == 4
    assert len(directions) == 2
    assert pattern == pattern[::-1]


@pytest.mark.parametrize("files", [SLOW, FAST], ids=["slow", "fast"])
def test_steps_between_frames_reveal_neither_speed_nor_direction(files):
    """Null control: statistics of half of the clips predict the others at chance."""

    def guessed(indices_of, label: str) -> float:
        counts = collections.defaultdict(collections.Counter)
        right = []
        rng = np.random.default_rng(3)
        for number in range(6000):
            times = list(files.values())[rng.integers(len(files))]
            speed, direction = int(rng.integers(4)), int(rng.integers(2))
            start = rng.uniform(0, timeline_of(times).end_seconds - 0.75 * SHARED.speeds[speed])
            clip = Clip(float(start), speed, direction)
            steps = np.abs(np.diff(indices_of(clip, times)))
            pattern = tuple((steps / steps.mean()).round(1))
            truth = getattr(clip, label)
            if number < 3000:
                counts[pattern][truth] += 1
            elif counts[pattern]:
                right.append(counts[pattern].most_common(1)[0][0] == truth)
        return float(np.mean(right))

    def by_time(clip: Clip, times: np.ndarray) -> np.ndarray:
        step = SHARED.frame_seconds * SHARED.speeds[clip.speed]
        shown = clip.start_seconds + step * np.arange(12)
        begun = np.searchsorted(times, shown + 1e-6, side="right")
        return np.clip(begun - 1, 0, len(times) - 1)

    def shipped(clip: Clip, times: np.ndarray) -> np.ndarray:
        return frame_indices(clip, times, SHARED)

    assert guessed(shipped, "speed") < 0.25 + 4 * np.sqrt(0.25 * 0.75 / 3000)
    assert guessed(shipped, "direction") < 0.5 + 4 * np.sqrt(0.25 / 3000)
    assert guessed(by_time, "speed") > 0.6  # what it would find


def test_the_settings_page_states_for_how_many_pairs_of_speeds_order_is_defined():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    for clip_seconds, undefined in ((0.5, 0), (0.75, 1), (0.769, 1), (0.77, 3), (1.0, 5)):
        spans = clip_seconds * np.array([1, 2, 4, 8])
        assert (~order_fits(spans[:, None], spans, 10.0)).sum() == undefined
        assert f"| {clip_seconds} | {undefined} of 16 |" in page


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("speeds", ()),
        ("speeds", (0, 1)),
        ("speeds", (1, 1.5)),
        ("speeds", (1, 2, 2)),
        ("speeds", (2, 1)),
        ("num_frames", 1),
        ("clip_seconds", 0.0),
        ("audio_transform", "own"),
    ],
)
def test_timing_without_meaning_is_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        dataclasses.replace(SHARED, **{setting: value})
    assert dataclasses.replace(SHARED, num_frames=2, speeds=(1,), clip_seconds=0.1)


def test_clips_are_evenly_spaced_a_single_one_is_in_the_middle_and_a_long_one_at_the_start():
    assert clip_times(1.0, 5.0, 2.0, 3) == [1.0, 2.0, 3.0]
    assert clip_times(1.0, 5.0, 2.0, 1) == [2.0]
    assert clip_times(1.0, 2.5, 2.0, 2) == [1.0, 1.0]


def test_the_fewest_clips_cover_an_interval_but_for_a_twentieth_of_a_clip():
    assert clip_times(1.0, 4.0, 1.0) == [1.0, 2.0, 3.0]
    assert clip_times(1.0, 4.04, 1.0) == pytest.approx([1.0, 2.02, 3.04])
    assert clip_times(1.0, 4.06, 1.0) == pytest.approx([1.0, 1.687, 2.373, 3.06], abs=1e-3)
    assert clip_times(1.0, 1.5, 2.0) == [1.0]


def test_a_speed_fits_up_to_the_length_and_the_frame_rate_of_a_video():
    # A clip of 0.75 s at 1x takes a frame every 1/16 s.
    fits = views_fit([0.75, 0.7499, 6.0, 5.9999], 1 / 16, SHARED)
    np.testing.assert_array_equal(fits, [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    # Down to 0.45 of the clip's rate frames repeat alike at every speed; below, none may repeat.
    slowest = 1 / 16 / 0.45
    np.testing.assert_array_equal(views_fit(6.0, slowest - 1e-9, SHARED), [1, 1, 1, 1])
    np.testing.assert_array_equal(views_fit(6.0, slowest + 1e-9, SHARED), [0, 0, 1, 1])


@pytest.mark.parametrize("fps", [16, 30])
def test_clips_at_the_ends_of_a_file_show_its_first_and_last_frames(fps):
    times = constant(fps)  # 16 fps by time, 30 fps by number
    for speed in range(4):
        span = SHARED.frame_seconds * SHARED.speeds[speed] * 11
        first = frame_indices(Clip(-0.2, speed, FORWARD), times, SHARED)
        last = frame_indices(Clip(float(times[-1]) - span + 0.2, speed, FORWARD), times, SHARED)
        assert (first[0], last[-1]) == (0, len(times) - 1)
    # At 8x, the last of 12 frames is 168 frames of 30 fps behind the first.
    clip, enough = Clip(0.0, 3, FORWARD), constant(30)[:169]
    assert set(np.diff(frame_indices(clip, enough, SHARED)) % 8) == {0}
    assert set(np.diff(frame_indices(clip, enough[:-1], SHARED)) % 8) != {0}


def test_without_video_only_the_length_decides_whether_speed_is_defined():
    uneven = np.cumsum(np.random.default_rng(0).exponential(0.07, 140))
    for seconds, defined in ((6.0, True), (5.9, False)):
        heard = Timeline(0.0, seconds, 0.0, has_video=False)
        for frame_seconds in (uneven, np.empty(0)):
            pair = draw_views(np.random.default_rng(0), heard, SHARED, frame_seconds)
            assert pair.speed_mask is defined


def test_order_is_defined_if_the_intervals_and_a_gap_fit():
    # A quarter of the shorter one is between them.
    assert order_fits(1.0, 2.0, 3.25)
    assert not order_fits(1.0, 2.0, 3.2499)


def test_too_short_is_one_clear_error():
    with pytest.raises(ValueError, match=r"0\.75 s at 16 frames/s fits into 0\.500 s"):
        draw_views(np.random.default_rng(0), Timeline(0.0, 0.5, 1 / 16), SHARED, np.arange(8) / 16)
