"""Every family changes what it says, by as much as its strength says, and nothing else."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from avcl_jax.data.media import DecodedMedia
from avcl_jax.data.spectrogram import samples_at
from avcl_jax.fingerprint.benchmark.families import FAMILIES, STRENGTHS, transform
from avcl_jax.fingerprint.benchmark.timeline import Transformed
from tests.fingerprint.benchmark.clips import (
    FPS,
    HEIGHT,
    RATE,
    SECONDS,
    WIDTH,
    clip,
    log_mel,
    source_seconds,
)

CLIP, OTHER = clip(0), clip(5)
VIDEO = [n for n, f in FAMILIES.items() if f.changes == {"video"}]
GRADED = set(FAMILIES) - {"flip", "audio_removed", "audio_swapped"}


def made(family: str, strength: str = "medium", *, seed: int = 0, name: str = "a") -> Transformed:
    return transform(CLIP, family, strength, seed=seed, clip=name, other=OTHER)


def same(media: DecodedMedia, *names: str) -> bool:
    """Tests if the arrays of a copy are those of the clip."""
    return all(np.array_equal(getattr(media, name), getattr(CLIP, name)) for name in names)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_says_it_changes_changes_and_nothing_else(family, strength):
    media, changes = made(family, strength).media, FAMILIES[family].changes
    assert same(media, "frames", "frame_seconds") == ("video" not in changes)
    assert same(media, "waveform") == ("audio" not in changes)
    assert (media.frames.dtype, media.waveform.dtype) == (np.uint8, np.int16)
    assert media.frames.shape[-1] == 3
    assert len(media.frames) == len(media.frame_seconds)
    assert (np.diff(media.frame_seconds) > 0).all()
    assert media.frame_seconds[-1] < media.duration_seconds


def content(copy: Transformed) -> tuple:
    media = copy.media
    return media.frames.tobytes(), media.waveform.tobytes(), copy.video_pieces, copy.audio_pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_copy_and_another_another(family):
    # What reads memory that nobody has written is right now and then.
    assert len({content(made(family)) for _ in range(5)}) == 1
    drawn = ("crop", "noise", "overlay", "caption", "trim", "splice", "audio_noise", "truncation")
    if family in drawn:
        others = {content(made(family, seed=seed, name=n)) for seed, n in ((0, "b"), (1, "a"))}
        assert content(made(family)) not in others


def distortion(family: str, strength: str) -> float:
    """How far a copy is from its original, in the family's own coin."""
    result = made(family, strength)
    media = result.media
    if family in ("trim", "truncation"):
        return -media.duration_seconds
    if family == "splice":
        (piece,) = result.video_pieces
        return piece.begin_seconds - piece.end_seconds
    if family in ("speed", "speed_and_pitch", "tempo"):
        (piece,) = result.audio_pieces
        return abs(np.log(piece.rate))
    if family == "frame_rate":
        return -media.fps
    if family == "crop":
        return -float(np.prod(media.frames.shape[1:3]))
    if family == "pad":
        return float((media.frames.max(axis=(0, 3)) == 0).mean())
    if family in VIDEO:
        shown = np.stack([cv2.resize(f, (WIDTH, HEIGHT)) for f in media.frames])
        return float(np.abs(shown.astype(int) - CLIP.frames).mean())
    return float(np.abs(log_mel(media) - log_mel(CLIP)).mean())


@pytest.mark.parametrize("family", sorted(GRADED))
def test_medium_is_between_weak_and_strong(family):
    weak, medium, strong = (distortion(family, strength) for strength in STRENGTHS)
    assert weak < medium < strong


# Mirrored, turned, cropped or narrowed frames are elsewhere, a higher tone is in another band:
# tests of their own are below.
MOVED = ("flip", "rotate", "crop", "pad", "speed_and_pitch")
IN_PLACE = [n for n in FAMILIES if n not in MOVED]


@pytest.mark.parametrize("family", IN_PLACE)
def test_even_strong_changes_leave_more_of_the_clip_than_of_another(family):
    result = made(family, "strong")
    for pieces, signals in ((result.video_pieces, _frames), (result.audio_pieces, _spectra)):
        moments = result.media.frame_seconds[1:-2:2]
        moments = moments[moments < result.media.duration_seconds - 0.2]
        original = source_seconds(pieces, moments)
        known = np.isfinite(original) & (original < SECONDS - 0.2)
        if not known.any():
            assert family in ("audio_removed", "audio_swapped")
            continue
        shown = signals(result.media, moments[known])
        likeness = [
            np.corrcoef(shown.reshape(-1), signals(media, original[known]).reshape(-1))[0, 1]
            for media in (CLIP, OTHER)
        ]
        assert likeness[0] > likeness[1], signals


def _frames(media: DecodedMedia, moments: np.ndarray) -> np.ndarray:
    """Middle rows of the frame at each moment: captions are above and below."""
    places = np.searchsorted(media.frame_seconds, moments + 1e-6, side="right") - 1
    frames = media.frames[np.maximum(places, 0)]
    return np.stack([cv2.resize(f, (WIDTH, HEIGHT))[12:-12] for f in frames]).astype(float)


def _spectra(media: DecodedMedia, moments: np.ndarray) -> np.ndarray:
    """Log spectra of a tenth of a second at each moment."""
    begins = np.rint((moments - media.audio_start_seconds) * media.sample_rate_hz).astype(int)
    heard = samples_at(media.waveform, begins[:, None] + np.arange(RATE // 10))
    power = np.abs(np.fft.rfft(heard * np.hanning(RATE // 10))) ** 2
    return np.log(power[:, :800].reshape(-1, 40, 20).mean(axis=2) + 1e4)


def test_a_clip_without_what_a_family_changes_is_refused():
    silent, blind = clip(audio=False), clip(video=False)
    with pytest.raises(ValueError, match="a has no audio, which pitch changes"):
        transform(silent, "pitch", "weak", seed=0, clip="a", other=OTHER)
    with pytest.raises(ValueError, match="a has no video, which crop changes"):
        transform(blind, "crop", "weak", seed=0, clip="a", other=OTHER)


@pytest.mark.parametrize("family", ["speed", "speed_and_pitch", "trim", "splice", "truncation"])
@pytest.mark.parametrize("lacking", ["video", "audio"])
def test_changes_of_time_work_on_one_modality(family, lacking):
    half = clip(**{lacking: False})
    result = transform(half, family, "medium", seed=0, clip="a", other=OTHER).media
    assert result.has_video == (lacking != "video")
    assert result.has_audio == (lacking != "audio")


def test_durations():
    assert made("trim").media.duration_seconds == pytest.approx(0.6 * SECONDS)
    assert made("truncation").media.duration_seconds == 2
    assert len(made("truncation").media.waveform) == 2 * RATE
    assert made("splice").media.duration_seconds == pytest.approx(SECONDS)
    assert len(made("frame_rate").media.frames) == FPS * SECONDS // 3
    (piece,) = made("speed").video_pieces
    assert piece.rate in (0.75, 1.25)
    assert made("speed").media.duration_seconds == pytest.approx(SECONDS / piece.rate)
    assert len(made("speed").media.waveform) == round(SECONDS * RATE / piece.rate)


@pytest.mark.parametrize(
    ("strength", "rates"), [("weak", (1.025, 25 / 24)), ("medium", (1.08,)), ("strong", (1.25,))]
)
def test_a_copy_played_faster_is_shorter_and_its_tone_higher(strength, rates):
    times = np.arange(SECONDS * RATE) / RATE
    # 1 kHz, until a click at 4 s; the video is black until then.
    wave = np.where(times < 4, 8000 * np.sin(2 * np.pi * 1000 * times), 0)
    wave[4 * RATE : 4 * RATE + 20] = 30_000
    media = dataclasses.replace(CLIP, waveform=wave.astype(np.int16))
    lit = CLIP.frame_seconds >= 4
    media = dataclasses.replace(media, frames=CLIP.frames * lit[:, None, None, None])
    met = set()
    for seed in range(6):
        result = transform(media, "speed_and_pitch", strength, seed=seed, clip="a", other=None)
        faster, (piece,) = result.media, result.audio_pieces
        assert result.video_pieces == result.audio_pieces
        met.add(piece.rate)
        tone = faster.waveform[: 3 * RATE] * np.hanning(3 * RATE)
        hertz = np.abs(np.fft.rfft(tone, 8 * len(tone))).argmax() / 24
        assert hertz == pytest.approx(1000 * piece.rate, abs=0.1)
        assert len(faster.waveform) == pytest.approx(SECONDS * RATE / piece.rate, abs=1)
        assert faster.duration_seconds == pytest.approx(SECONDS / piece.rate)
        click = faster.waveform.argmax() / RATE
        flash = faster.frame_seconds[faster.frames.max(axis=(1, 2, 3)) > 0][0]
        assert click == pytest.approx(4 / piece.rate, abs=0.002)
        assert flash == pytest.approx(4 / piece.rate, abs=1e-9)
        assert source_seconds(result.audio_pieces, np.array([flash])) == pytest.approx(4)
    assert met == set(rates)


def test_a_crop_is_one_part_of_every_frame():
    frames = made("crop").media.frames
    assert frames.shape[1:3] == (HEIGHT * 3 // 4, WIDTH * 3 // 4)
    places = [
        (top, left)
        for top in range(HEIGHT // 4 + 1)
        for left in range(WIDTH // 4 + 1)
        if np.array_equal(
            CLIP.frames[:, top : top + frames.shape[1], left : left + frames.shape[2]], frames
        )
    ]
    assert len(places) == 1


def test_a_flip_is_a_mirror_and_bars_are_black():
    assert np.array_equal(made("flip").media.frames, CLIP.frames[:, :, ::-1])
    padded = made("pad").media.frames
    bars = np.array(padded.shape[1:3]) - (HEIGHT, WIDTH)
    assert sorted(bars > 0) == [False, True]
    top, left = bars // 2
    assert np.array_equal(padded[:, top : top + HEIGHT, left : left + WIDTH], CLIP.frames)
    assert padded.astype(int).sum() == CLIP.frames.astype(int).sum()


def test_exchanged_audio_is_that_of_the_other_clip():
    assert np.array_equal(made("audio_swapped").media.waveform, OTHER.waveform)
    assert made("audio_swapped").audio_pieces == ()
