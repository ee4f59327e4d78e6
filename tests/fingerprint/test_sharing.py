"""Sharing between the sources of an index, with descriptions in place of encoders."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from avcl_jax.fingerprint import database, library
from avcl_jax.fingerprint.benchmark.timeline import at_tempo, excerpt, joined
from avcl_jax.fingerprint.database import SourceRow, transaction
from avcl_jax.fingerprint.details import describe
from avcl_jax.fingerprint.relations import MANY
from avcl_jax.fingerprint.segments import SegmentFeatures
from avcl_jax.fingerprint.settings import FingerprintSettings
from avcl_jax.fingerprint.sharing import find_shared
from tests.fingerprint import synthetic
from tests.fingerprint.synthetic import RATE_HZ
from tests.fingerprint.test_details import speech

HOP, SPAN = 0.25, 0.5
SPANS = {"video": SPAN, "audio": SPAN}


def clip(seed: int, seconds: float = 8.0):
    return dataclasses.replace(
        synthetic.clip(seed, seconds), waveform=speech(seed, seconds), duration_seconds=seconds
    )


def noisy(media, seed: int = 9):
    """A copy with noise, a third as loud."""
    rng = np.random.default_rng(seed)
    frames = media.frames.astype(int) + rng.integers(-6, 7, media.frames.shape)
    sound = media.waveform / 3 + 20 * rng.normal(size=len(media.waveform))
    return dataclasses.replace(
        media, frames=frames.clip(0, 255).astype(np.uint8), waveform=sound.astype(np.int16)
    )


def without(media, modality: str):
    if modality == "video":
        return dataclasses.replace(media, frames=np.zeros_like(media.frames))
    return dataclasses.replace(media, waveform=np.zeros_like(media.waveform))


def faster(media, rate: float):
    return dataclasses.replace(
        media,
        frame_seconds=media.frame_seconds / rate,
        waveform=at_tempo(media.waveform, RATE_HZ, rate),
        duration_seconds=media.duration_seconds / rate,
    )


def segments(media) -> SegmentFeatures:
    """Small frames and spectra of the segments of a clip."""
    starts = np.arange(0, media.duration_seconds - SPAN + 1e-6, HOP)
    features, present = {"video": [], "audio": []}, {}
    for start in starts:
        shown = media.frames[media.shown_at(start + np.array([0.0, 0.2, 0.4]))]
        features["video"].append(np.ravel([cv2.resize(f, (5, 5)) for f in shown]))
        first = round(start * RATE_HZ)
        sound = np.pad(media.waveform, (0, RATE_HZ))[first : first + round(SPAN * RATE_HZ)]
        power = np.abs(np.fft.rfft(sound.reshape(4, -1), axis=1)) ** 2
        bands = np.add.reduceat(power, np.geomspace(4, 450, 24).astype(int), axis=1)
        features["audio"].append(np.log(bands + 1e-3 * bands.mean() + 1e-9).ravel())
    made = {m: np.array(rows, np.float32) for m, rows in features.items()}
    present["video"] = np.ptp(made["video"], axis=1) > 20
    present["audio"] = np.ptp(made["audio"], axis=1) > 0
    return SegmentFeatures(
        made,
        present,
        media.duration_seconds,
        details=describe(media, media.duration_seconds),
    )


@pytest.fixture
def share(tmp_path):
    """Function that returns what clips share, by name."""

    def share(clips, *, min_seconds: float = 3.0, contents=None):
        settings = dataclasses.asdict(FingerprintSettings(dimensions=48))
        widths = {"video": 225, "audio": 96}
        database.create(
            tmp_path,
            {
                "encoder": {"path": "", "fingerprint": ""},
                "settings": settings,
                "dimensions": widths,
                "calibration": {"segments": 0, "by_modalities": {}},
            },
        )
        with transaction(tmp_path, write=True) as opened:
            for name, media in clips.items():
                content = (contents or {}).get(name, name)
                row = SourceRow(name, content, media.duration_seconds, None)
                opened.insert(row, segments(media))
        return find_shared(library.load(tmp_path), tmp_path, SPANS, min_seconds=min_seconds)

    return share


def others(count: int = 6, first: int = 40):
    return {f"other {n}": clip(n) for n in range(first, first + count)}


def only(shared):
    """The only pair, with its interval."""
    (pair,) = shared.pairs
    (interval,) = pair.intervals
    return pair, interval


def names(group):
    return sorted(source.name for source in group)


def test_unrelated_clips_share_nothing(share):
    shared = share(others(12))
    assert (shared.pairs, shared.groups, shared.materials) == ([], [], [])


@pytest.mark.parametrize("change", [noisy, lambda m: faster(noisy(m), 1.1)])
def test_a_changed_copy_is_a_copy(share, change):
    shared = share({"original": clip(1), "copy": change(clip(1)), **others()})
    pair, interval = only(shared)
    assert pair.relation == "copy"
    assert pair.matched == ("video", "audio")
    for source, seconds in zip((pair.first, pair.second), interval.sides, strict=True):
        assert seconds.start == pytest.approx(0, abs=0.5)
        assert seconds.end == pytest.approx(source.duration_seconds, abs=0.8)
    assert [names(group) for group in shared.groups] == [["copy", "original"]]


def test_a_mirrored_copy_matches_by_video_and_audio(share):
    mirrored = dataclasses.replace(clip(1), frames=clip(1).frames[:, :, ::-1])
    # The description changes with mirroring, as those of some encoders do, but not of the audio.
    shared = share({"original": clip(1), "mirrored": mirrored, **others()})
    pair, _ = only(shared)
    assert pair.matched[-1] == "audio"


def test_a_trimmed_copy_is_contained_in_the_original(share):
    shared = share(
        {"original": clip(1, 16), "part": noisy(excerpt(clip(1, 16), 4, 10)), **others()}
    )
    pair, interval = only(shared)
    assert (pair.relation, pair.first.name, pair.second.name) == ("contained", "part", "original")
    assert interval.sides[0].start == pytest.approx(0, abs=0.4)
    assert interval.sides[0].end == pytest.approx(6, abs=0.5)
    assert interval.sides[1].start == pytest.approx(4, abs=0.4)
    assert interval.sides[1].end == pytest.approx(10, abs=0.5)
    assert not shared.groups


def test_each_excerpt_of_a_compilation_has_its_interval(share):
    clips = {str(n): clip(n) for n in range(3)}
    parts = [excerpt(clip(n), 1 + n, 5 + n) for n in range(3)]
    shared = share({**clips, "compilation": noisy(joined(parts)), **others()})
    assert len(shared.pairs) == 3
    for pair in shared.pairs:
        assert pair.second.name == "compilation"
        number = int(pair.first.name)
        (interval,) = pair.intervals
        assert interval.sides[0].start == pytest.approx(1 + number, abs=0.6)
        assert interval.sides[1].start == pytest.approx(4 * number, abs=0.6)
        assert interval.sides[1].end == pytest.approx(4 * number + 4, abs=0.6)


@pytest.mark.parametrize(("kept", "field"), [("video", "waveform"), ("audio", "frames")])
def test_other_audio_or_video_is_said_and_is_no_copy(share, kept, field):
    changed = dataclasses.replace(clip(1), **{field: getattr(clip(2), field)})
    shared = share({"original": clip(1), "changed": noisy(changed), **others()})
    pair, interval = only(shared)
    assert (pair.relation, interval.matched) == ("partial", (kept,))
    assert not shared.groups


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_a_copy_without_one_modality_is_contained_in_the_original(share, missing):
    copy = without(noisy(clip(1)), missing)
    shared = share({"original": clip(1), "copy": copy, **others()})
    pair, _ = only(shared)
    assert (pair.relation, pair.first.name) == ("contained", "copy")
    assert missing not in pair.matched


def test_black_leaders_are_not_shared(share):
    leader = synthetic.leader(4.0)
    clips = {f"take {n}": joined([leader, clip(n)]) for n in range(6)}
    shared = share({**clips, **others()})
    assert not shared.pairs
    assert not shared.materials


def test_an_intro_of_many_is_told_apart_from_a_copy(share):
    intro = excerpt(clip(30), 0, 4)
    episodes = {f"episode {n}": joined([intro, clip(n)]) for n in range(6)}
    episodes["copy of 3"] = noisy(episodes["episode 3"])
    shared = share({**episodes, **others()})
    assert [names(group) for group in shared.groups] == [["copy of 3", "episode 3"]]
    pair, *rest = shared.pairs
    assert not rest
    assert pair.relation == "copy"
    (material,) = shared.materials
    # The copy counts once.
    assert material.shared_by == 6
    assert names(o.source for o in material.occurrences) == sorted(episodes)
    for occurrence in material.occurrences:
        assert occurrence.seconds.start == pytest.approx(0, abs=0.5)
        assert occurrence.seconds.end == pytest.approx(4, abs=0.8)


def test_an_intro_of_few_is_a_common_part(share):
    intro = excerpt(clip(30), 0, 4)
    episodes = {f"episode {n}": joined([intro, clip(n)]) for n in range(MANY - 1)}
    shared = share({**episodes, **others()})
    assert not shared.materials
    assert len(shared.pairs) == MANY * (MANY - 1) // 2 - (MANY - 1)
    for pair in shared.pairs:
        assert pair.relation == "partial"
        assert pair.intervals[0].shared_by == MANY - 1


def test_copies_of_everything_hide_nothing(share):
    """A calibration of scores to the library would take copies for what chance gives."""
    originals = {f"film {n}": clip(n) for n in range(12)}
    shared = share({**originals, **{f"copy of {k}": noisy(m) for k, m in originals.items()}})
    assert len(shared.groups) == 12
    assert all(len(group) == 2 for group in shared.groups)
    assert len(shared.pairs) == 12


def test_the_same_file_under_two_names_is_named_so(share):
    clips = {"a": clip(1), "b": clip(1), **others()}
    shared = share(clips, contents={"a": "same", "b": "same"})
    pair, interval = only(shared)
    assert pair.relation == "same file"
    assert interval.sides == ((0.0, 8.0), (0.0, 8.0))
    assert [names(group) for group in shared.groups] == [["a", "b"]]


def test_slides_of_one_template_are_no_copies(share):
    """Still images that are alike but for a text, with other speech."""

    def slide(n: int, seconds: float = 8.0):
        rng = np.random.default_rng(5)
        image = np.full((24, 24, 3), 230, np.uint8)
        image[:6] = rng.integers(40, 120, (6, 24, 3))
        image[8:20] -= 90 * np.random.default_rng(n).integers(0, 2, (12, 24, 1), np.uint8)
        frames = np.broadcast_to(image, (round(seconds * synthetic.FPS), *image.shape))
        return dataclasses.replace(clip(n, seconds), frames=frames)

    slides = {f"slide {n}": slide(n) for n in range(12)}
    shared = share({**slides, "copy of 3": noisy(slide(3)), **others()})
    assert [names(group) for group in shared.groups] == [["copy of 3", "slide 3"]]
    assert len(shared.pairs) == 1
    assert not shared.materials


def test_one_source_shares_nothing(share):
    assert not share({"a": clip(1)}).pairs


def test_parts_shorter_than_asked_for_are_left_out(share):
    part = joined([excerpt(clip(1), 2, 6), clip(2)])
    clips = {"original": clip(1), "part": part, **others()}
    assert len(share(clips, min_seconds=3.0).pairs) == 1


def test_a_longer_minimum_leaves_the_part_out(share):
    part = joined([excerpt(clip(1), 2, 6), clip(2)])
    assert not share({"original": clip(1), "part": part, **others()}, min_seconds=6.0).pairs
