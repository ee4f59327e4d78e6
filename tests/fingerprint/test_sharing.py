"""Sharing between the sources of an index, with descriptions in place of encoders."""

from __future__ import annotations

import dataclasses
import itertools
import types

import cv2
import numpy as np
import pytest

from avcl_jax.fingerprint import database, library
from avcl_jax.fingerprint.agreement import agree, runs
from avcl_jax.fingerprint.benchmark.timeline import at_tempo, excerpt, joined
from avcl_jax.fingerprint.database import SourceRow, transaction
from avcl_jax.fingerprint.details import (
    AUDIO_HZ,
    IMAGE_BYTES,
    NO_DETAILS,
    VIDEO_HZ,
    Candidate,
    describe,
)
from avcl_jax.fingerprint.intervals import Interval, Seconds, Span, join
from avcl_jax.fingerprint.relations import MANY, relate
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


def span(begin, end, offset=10.0, *, modality="video", exact=True, rate=1.0) -> Span:
    return Span(modality, exact, begin, end, rate, offset)


def joined_sides(*spans, min_seconds=3.0, durations=(100.0, 100.0)):
    """Sides of the intervals of spans, as tuples of seconds."""
    return [tuple(map(tuple, i.sides)) for i in join(spans, durations, min_seconds)]


def test_a_span_of_the_other_source_has_the_inverse_line():
    there = span(2.0, 6.0, rate=1.25).inverted()
    assert (there.begin, there.end) == (12.5, 17.5)
    assert (there.there(12.5), there.there(17.5)) == (2.0, 6.0)
    assert there.inverted() == span(2.0, 6.0, rate=1.25)


def test_spans_of_a_line_are_joined_over_a_second_and_last_the_minimum():
    assert joined_sides(span(0, 4), span(5, 9)) == [((0, 9), (10, 19))]
    apart = [((0, 4), (10, 14)), ((5.25, 9), (15.25, 19))]
    assert joined_sides(span(5.25, 9), span(0, 4)) == apart
    # Measured to half a second.
    assert joined_sides(span(0, 2.5)) == [((0, 2.5), (10, 12.5))]
    assert joined_sides(span(0, 2.25)) == []
    assert joined_sides(span(0, 2.25), min_seconds=2.75) == [((0, 2.25), (10, 12.25))]


def test_a_line_may_drift_and_another_line_is_another_interval():
    # The ends lie where the spans that are nearest to them say.
    assert joined_sides(span(0, 4), span(4, 8, 10.75)) == [((0, 8), (10, 18.75))]
    assert joined_sides(span(0, 4), span(4, 8, 11)) == [((0, 4), (10, 14)), ((4, 8), (15, 19))]
    # A drift counts in the middle of the later span, and from the last span.
    assert len(joined_sides(span(0, 8), span(4, 12, 9.2, rate=1.1))) == 1
    assert len(joined_sides(span(0, 4), span(4, 8, 10.7), span(8, 12, 11.4))) == 1


def test_the_longest_line_of_a_loop_counts():
    loop = span(0, 8), span(1, 6, 12.0)
    assert joined_sides(*loop) == [((0, 8), (10, 18))]
    assert joined_sides(*loop[::-1]) == [((0, 8), (10, 18))]
    # The same seconds of the first source may be in two places of the second.
    assert joined_sides(span(0, 8), span(0, 5, 40.0)) == [((0, 5), (40, 45)), ((0, 8), (10, 18))]
    # Half of it is not most of it.
    assert len(joined_sides(span(0, 8), span(5, 11, 8.0))) == 2


def test_intervals_end_with_either_source():
    durations = 5.0, 12.0
    assert joined_sides(span(-1, 6, 3.0), durations=durations) == [((0, 5), (3, 8))]
    assert joined_sides(span(0, 5, -2.0, rate=2.0), durations=durations) == [((1, 5), (0, 8))]
    assert joined_sides(span(0, 5, 4.0, rate=2.0), durations=durations) == [((0, 4), (4, 12))]


def test_an_interval_is_cut_where_the_modalities_change_but_into_no_short_pieces():
    def pieces(*spans):
        return [(*i.sides[0], i.matched, i.exact) for i in join(spans, (100.0, 100.0), 3.0)]

    both = ("video", "audio")
    video = span(0, 12)
    assert pieces(video, span(0, 6, modality="audio")) == [
        (0, 6, both, both),
        (6, 12, ("video",), ("video",)),
    ]
    # The shortest piece lasts the minimum, measured to half a second.
    assert [p[:2] for p in pieces(video, span(0, 2.5, modality="audio"))] == [(0, 2.5), (2.5, 12)]
    # A modality of less than half of an interval does not match.
    assert pieces(video, span(10, 12, modality="audio")) == [(0, 12, ("video",), ("video",))]
    # A short piece belongs to its longer neighbour.
    audio = span(2, 8, modality="audio")
    assert pieces(span(0, 14), audio) == [(0, 8, both, both), (8, 14, ("video",), ("video",))]
    assert pieces(span(0, 8), span(2, 14, modality="audio"))[0][:2] == (0, 8)
    later = span(5, 14, modality="audio")
    assert [p[:2] for p in pieces(span(0, 14), span(0, 3, modality="audio"), later)] == [
        (0, 3),
        (3, 14),
    ]
    # Neither modality matches half of the time, but each as much as the other.
    turns = span(0, 2), span(2, 4, modality="audio")
    assert pieces(*turns) == [(0, 4, both, both)]
    mixed = span(0, 12, modality="audio", exact=False)
    assert pieces(video, mixed) == [(0, 12, both, ("video",))]


BOTH = ("video", "audio")


def interval(first, second, matched=BOTH, exact=BOTH) -> Interval:
    return Interval((Seconds(*first), Seconds(*second)), matched, exact)


def related(durations, found, *, segments_of_audio=None):
    """Relations of sources "0", "1" and so on that have video and audio all along."""
    sources = [
        SourceRow(str(n), f"content {n}", seconds, None, round(seconds / HOP))
        for n, seconds in enumerate(durations)
    ]

    def vectors_of(modality, number, first, stop):
        present = np.ones(sources[number].segments, bool)
        if modality == "audio" and segments_of_audio is not None:
            present[segments_of_audio:] = False
        return None, present[first:stop]

    indexed = types.SimpleNamespace(
        sources=sources,
        settings=types.SimpleNamespace(hop_seconds=HOP),
        vectors=dict.fromkeys(BOTH),
        vectors_of=vectors_of,
    )
    return relate(indexed, found)


def relation(durations, *intervals, **fields):
    """Relation of two sources, and the names of the pair."""
    (pair,) = related(durations, {(0, 1): list(intervals)}, **fields).pairs
    return pair.relation, pair.first.name + pair.second.name


def test_a_copy_shares_three_quarters_of_both_sources_in_each_modality():
    assert relation((8, 8), interval((0, 6), (2, 8))) == ("copy", "01")
    assert relation((8, 8), interval((0, 5.75), (0, 5.75))) == ("partial", "01")
    assert relation((8, 8), interval((0, 3), (0, 3)), interval((5, 8), (5, 8)))[0] == "copy"
    assert relation((8, 16), interval((0, 8), (4, 12))) == ("contained", "01")
    assert relation((16, 8), interval((4, 12), (0, 8))) == ("contained", "10")
    # Covered video is a copy's beside the same audio, mixed audio is not.
    whole = (0, 8), (0, 8)
    assert relation((8, 8), interval(*whole, exact=("audio",)))[0] == "copy"
    assert relation((8, 8), interval(*whole, exact=("video",)))[0] == "partial"
    assert relation((8, 8), interval(*whole, ("audio",), ("audio",)))[0] == "partial"
    # Audio of less than two seconds is none.
    video = interval(*whole, ("video",), ("video",))
    assert relation((8, 8), video, segments_of_audio=8)[0] == "partial"
    assert relation((8, 8), video, segments_of_audio=7)[0] == "copy"


def test_pairs_and_groups_have_their_order():
    whole = [interval((0, 8), (0, 8))]
    found = {
        (0, 1): [interval((0, 3), (5, 8), ("audio",))],
        (0, 2): [interval((4, 8), (0, 4), ("video",))],
        (3, 4): whole,
        (4, 5): whole,
        (6, 7): whole,
        (2, 8): [interval((0, 8), (8, 16))],
    }
    shared = related([8] * 8 + [16], found)
    assert " ".join(p.first.name + p.second.name for p in shared.pairs) == "34 45 67 28 02 01"
    assert [names(group) for group in shared.groups] == [list("345"), list("67")]
    assert (shared.pairs[-1].seconds, shared.pairs[-1].matched) == (3, ("audio",))


def common(count, first=(1, 4), second=(1, 4), **fields):
    """Intervals of each pair of so many sources."""
    pairs = itertools.combinations(range(count), 2)
    return {pair: [interval(first, second, ("audio",), **fields)] for pair in pairs}


def test_what_many_sources_share_is_listed_once_and_what_few_share_by_pairs():
    shared = related([9] * MANY, common(MANY))
    assert not shared.pairs
    (material,) = shared.materials
    assert (material.shared_by, material.matched) == (MANY, ("audio",))
    assert [(o.source.name, *o.seconds) for o in material.occurrences] == [
        (str(n), 1, 4) for n in range(MANY)
    ]
    few = related([9] * MANY, common(MANY - 1))
    assert not few.materials
    assert [pair.intervals[0].shared_by for pair in few.pairs] == [MANY - 1] * 3
    # It may be elsewhere in one of them.
    moved = common(MANY - 1) | {(0, n): [interval((5, 8), (1, 4))] for n in range(1, MANY - 1)}
    few = related([9] * MANY, moved)
    assert [pair.intervals[0].shared_by for pair in few.pairs] == [MANY - 1] * 3
    # Less than a second of it is not material.
    assert not related([9] * MANY, common(MANY, (1, 1.75), (1, 1.75))).materials
    assert related([9] * MANY, common(MANY, (1, 2), (1, 2))).materials


def test_a_pair_with_more_in_common_is_listed_with_all_of_it():
    found = common(MANY)
    found[0, 1].append(interval((5, 8), (6, 9)))
    (pair,) = related([9] * MANY, found).pairs
    assert [i.shared_by for i in pair.intervals] == [MANY, 2]
    # Copies count once: these four are three.
    found = common(MANY)
    found[0, 1] = [interval((0, 9), (0, 9))]
    shared = related([9] * MANY, found)
    assert not shared.materials
    assert {i.shared_by for pair in shared.pairs[1:] for i in pair.intervals} == {MANY - 1}


def signs(seed: int, seconds: float = 12.0) -> np.ndarray:
    """Signs of audio of which half rise in each moment."""
    rng = np.random.default_rng(seed)
    bits = rng.permuted(np.arange(round(seconds * AUDIO_HZ) * 32).reshape(-1, 32) % 2, axis=1)
    return np.packbits(bits.astype(np.uint8), axis=1).view(np.uint32)[:, 0]


def flipped(values: np.ndarray, count: int) -> np.ndarray:
    """Signs of which so many differ in each moment, half of them of those that rise."""
    bits = np.unpackbits(values[:, None].view(np.uint8), axis=1)
    rank = np.where(bits, np.cumsum(bits, axis=1), np.cumsum(1 - bits, axis=1))
    changed = np.where(rank <= count // 2 + (count % 2) * bits, 1 - bits, bits)
    return np.packbits(changed, axis=1).view(np.uint32)[:, 0]


def by_audio(query, reference, **fields):
    """Agreement by audio alone; the source begins a second before the query."""
    before = signs(77, 1.0)
    candidate = Candidate(NO_DETAILS._replace(audio=np.concatenate([before, reference])), 0, 1, 1)
    return agree(NO_DETAILS._replace(audio=query), candidate, **fields)


@pytest.mark.parametrize(
    ("differ", "agrees"), [(8, (1, 1)), (9, (0, 1)), (11, (0, 1)), (12, (0, 0))]
)
def test_audio_agrees_by_the_fraction_of_its_signs(differ, agrees):
    made = by_audio(signs(1), flipped(signs(1), differ))
    assert [mask.mean() for mask in made.moments["audio"]] == list(agrees)
    assert (made.rate, made.offset_seconds) == (1, pytest.approx(1, abs=1 / AUDIO_HZ))
    assert not any(len(mask) for mask in made.moments["video"])


def test_ends_of_audio_that_agrees_are_right_to_a_quarter_of_a_second():
    reference = flipped(signs(1), 4)
    outside = np.repeat([True, False, True], [48, 80, 64])  # 3 to 8 s agree
    reference[outside] = signs(2)[outside]
    for mask in by_audio(signs(1), reference).moments["audio"]:
        ((begin, end),) = runs(mask)
        assert (begin / 4, end / 4) == (pytest.approx(3, abs=0.25), pytest.approx(8, abs=0.25))
    # What agrees for less than a second is little of three.
    outside[48 + 12 :] = True
    reference[outside] = signs(2)[outside]
    assert not any(mask.any() for mask in by_audio(signs(1), reference).moments["audio"])
    shorter = by_audio(signs(1), reference, seconds=1.0)
    assert all(mask.any() for mask in shorter.moments["audio"])


def test_audio_is_compared_where_half_of_the_time_has_signs_of_both_kinds():
    def agrees(compared: int, value: int) -> bool:
        """Compares where so many moments in each two seconds have signs of both kinds."""
        place = np.arange(192) % 32
        query = np.where((place % 2 == 0) & (place < 2 * compared), signs(1), np.uint32(value))
        return bool(by_audio(query, query, seconds=2.0).moments["audio"][0].any())

    for value in (0, 0b111, 0xFFFFFFF8):
        assert agrees(16, value)
        assert not agrees(15, value)
    assert agrees(15, 0b1111)
    assert agrees(15, 0xFFFFFFF0)


@pytest.mark.parametrize(("correlation", "agrees"), [(0.8, (1, 1)), (0.6, (0, 1)), (0.4, (0, 0))])
def test_images_agree_by_the_correlation_of_their_changes(correlation, agrees):
    own, other = np.random.default_rng(0).normal(size=(2, 12 * VIDEO_HZ, IMAGE_BYTES))
    mixed = correlation * own + np.sqrt(1 - correlation**2) * other
    query, source = (NO_DETAILS._replace(video=np.uint8(128 + 25 * v)) for v in (own, mixed))
    # The details of the source begin at its third second, and the query two seconds later.
    source = source._replace(video=np.concatenate([query.video[::-1][:8], source.video]))
    made = agree(query, Candidate(source, 3.0, 1.0, 5.0))
    assert [mask.mean() for mask in made.moments["video"]] == list(agrees)
    wrong = agree(query, Candidate(source, 3.0, 1.0, 7.0))
    assert not any(mask.any() for mask in wrong.moments["video"])
