"""Media: every real file comes out complete, upright and in time, or is refused truthfully."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data import media
from avcl_jax.data.media import MediaError
from avcl_jax.data.mono import channel_energies, choose_weights
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data_prep.__main__ import main as data_prep
from avcl_jax.data_prep.clip import REASONS, ClipOptions, prepare_clip
from tests.data.synthetic_media import (
    OPTIONS,
    SOUND_RATE,
    entry,
    heard_clicks,
    write_channels,
    write_clip,
)
from tests.data.test_synchrony import SPEC
from tests.data_prep.conftest import listed

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "media"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")

# By hand, from packet counts, headers and the table in ../shared/data/README.md: frames, height
# and width when displayed (rotation and pixel shape applied), when the last frame ends, and the
# seconds of sound from the first frame on (None: no sound track).
FACTS = {
    "av1_video.mkv": (125, 360, 640, 5.0, None),
    "big_buck_bunny_0_30.webm": (720, 720, 1280, 29.999, 30.016),  # 1,323,840 samples at 44.1 kHz
    "bigbuckbunny.mp4": (132, 720, 1280, 5.28, 5.312),
    "chaplin.mp4": (241, 360, 640, 9.64, 9.614),
    "cockatoo.mp4": (280, 720, 1280, 14.0, 13.899),
    "flipping_a_pancake.mkv": (310, 240, 426, 10.333, 10.368),
    "h264_10bits.mp4": (30, 200, 200, 1.0, None),
    "h265_10bits.mp4": (30, 200, 200, 1.0, None),
    "h265_video.mp4": (10, 128, 128, 1.0, None),
    "nasa_13013.mp4": (325, 180, 320, 13.0, 13.056),
    "no_duration.webm": (74, 720, 1280, 4.939, 4.86),
    "realshort.mp4": (36, 240, 320, 1.1992, 1.1857),
    "small_input_1.mp4": (150, 360, 640, 5.0139, 5.0133),  # 480x360 pixels of shape 4:3
    "transparent.webm": (150, 200, 200, 5.0, 4.94),
    "unordered.mov": (4, 50, 50, 0.125, None),
    "video_180.mov": (3, 320, 568, 0.1, None),
    "video_270.mov": (3, 568, 320, 0.1, None),
    "video_90.mov": (3, 568, 320, 0.1, None),
    "video_with_failing_audio.mp4": (280, 360, 640, 11.2, 11.2337),
}


def prepare(path: Path, start: float = 0.0, end: float | None = None) -> Record:
    return prepare_clip(entry(path, start, end), OPTIONS)[0]


def refusal(path: Path, **changes: object) -> str:
    with pytest.raises(MediaError) as caught:
        prepare_clip(entry(path), ClipOptions(**{**vars(OPTIONS), **changes}))
    assert caught.value.reason in REASONS
    assert caught.value.message
    assert "\n" not in str(caught.value)
    return caught.value.reason


@needs_real
@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_real_file_comes_out_complete_and_in_time(name: str) -> None:
    frames, height, width, picture_end, sound_seconds = FACTS[name]
    record = prepare(REAL / name)
    assert len(record.frames) == frames
    scale = min(1.0, OPTIONS.short_side / min(height, width))
    assert (record.height, record.width) == (round(height * scale), round(width * scale))
    header = simplejpeg.decode_jpeg_header(record.frames[-1])
    assert header[:2] == (record.height, record.width)
    assert record.frame_seconds[0] == 0
    # One frame lasts until the picture's end.
    last_gap = picture_end - record.frame_seconds[-1]
    assert last_gap == pytest.approx(np.median(np.diff(record.frame_seconds)), abs=0.02)
    if sound_seconds is None:
        assert not record.has_audio
        assert record.duration_seconds == pytest.approx(picture_end, abs=0.005)
        return
    assert record.sample_rate_hz == 16000
    heard = record.audio_start_seconds + len(record.waveform) / 16000
    expected_end = sound_seconds + (0.015 if name == "no_duration.webm" else 0.0)
    assert heard == pytest.approx(expected_end, abs=0.005)
    assert record.audio_start_seconds <= 0.0151
    assert record.duration_seconds == pytest.approx(max(picture_end, expected_end), abs=0.005)


@needs_real
@pytest.mark.parametrize("name", ["nasa_13013.mp4", "flipping_a_pancake.mkv", "bigbuckbunny.mp4"])
def test_sound_is_the_mix_of_the_channels_at_the_right_time(name: str) -> None:
    from scipy.signal import resample_poly

    with av.open(str(REAL / name)) as container:
        stream = container.streams.audio[0]
        decoded = np.concatenate([f.to_ndarray() for f in container.decode(stream)], axis=1)
        rate = stream.rate
    # ITU-R BS.775 to stereo (centre and surround at -3 dB, low-frequency channel left out), whose
    # two channels are then added: the centre counts twice.
    weights = {1: [1], 2: [1, 1], 6: [1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5]}[len(decoded)]
    mono = np.asarray(weights) @ decoded / np.sum(weights)
    expected = resample_poly(mono, 16000, rate)
    sound = media.decode_audio(REAL / name, sample_rate_hz=16000)
    assert sound is not None
    length = min(len(expected), len(sound.waveform))
    ours, theirs = sound.waveform[:length] / 32768, expected[:length]
    correlation = [
        np.corrcoef(
            ours[max(0, lag) : length + min(0, lag)],
            np.roll(theirs, lag)[max(0, lag) : length + min(0, lag)],
        )[0, 1]
        for lag in range(-8, 9)
    ]
    assert int(np.argmax(correlation)) == 8  # no lag
    assert correlation[8] > 0.99
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.05)


FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}


def test_a_gap_in_the_sound_is_silence(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    write_clip(path, 106, fps=25, audio_codec="pcm_s16le", sound_gap=(1.3, 1.8))
    np.testing.assert_allclose(heard_clicks(prepare(path)), [1, 2, 3, 4], atol=0.002)
    sound = media.decode_audio(path, sample_rate_hz=16000)
    assert sound is not None
    at = (np.arange(len(sound.waveform)) / 16000) + sound.start_seconds
    assert not sound.waveform[(at > 1.33) & (at < 1.79)].any()
    assert np.abs(sound.waveform[(at > 1.05) & (at < 1.29)].astype(int)).mean() > 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"movflags": "faststart"}
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_clip(path, 106, fps=25, side=64, sound_seconds=4.2, container_options=options)


INTERVAL_MEDIA = {
    "clip.mp4": ("libx264", "aac"),
    "clip.mkv": ("libx264", "libmp3lame"),
    "clip.ts": ("libx264", "aac"),
    "clip.webm": ("libvpx-vp9", "libopus"),
}


@pytest.mark.parametrize("name", sorted(INTERVAL_MEDIA))
def test_an_interval_is_what_the_whole_holds_there(tmp_path: Path, name: str) -> None:
    video_codec, audio_codec = INTERVAL_MEDIA[name]
    write_clip(
        tmp_path / name,
        106,
        fps=25,
        side=64,
        video_codec=video_codec,
        audio_codec=audio_codec,
        options=FAST_VP9 if name.endswith("webm") else {"g": "20", "x264opts": "open-gop=1"},
    )
    whole, part = prepare(tmp_path / name), prepare(tmp_path / name, 1.99, 3.5)
    first = round(2.0 * 25)
    np.testing.assert_allclose(
        part.frame_seconds, whole.frame_seconds[first : first + len(part.frames)] - 2.0, atol=0.0011
    )
    # A transport stream starts 21 ms into its own timeline.
    assert len(part.frames) in (37, 38)
    assert part.frames == whole.frames[first : first + len(part.frames)]
    assert part.duration_seconds == pytest.approx(1.5, abs=0.03)
    np.testing.assert_allclose(heard_clicks(part), [0.0, 1.0], atol=0.002)
    shift = round((2.0 + part.audio_start_seconds - whole.audio_start_seconds) * 16000)
    # Sample times agree to a fraction of a sample, so what is compared is below 2 kHz.
    ours, theirs = (
        np.convolve(sound.astype(float), np.ones(8), "valid")
        for sound in (part.waveform, whole.waveform[shift : shift + len(part.waveform)])
    )
    assert np.corrcoef(ours[200:], theirs[200:])[0, 1] > 0.98
    assert len(part.waveform) == pytest.approx(1.5 * 16000, abs=0.03 * 16000)


def test_an_interval_in_pictures_that_are_refreshed_part_by_part(tmp_path: Path) -> None:
    # The key frame that is sought stands at 1.6 s, and pictures are whole again from 3.2 s on.
    options = {"g": "40", "x264opts": "intra-refresh=1"}
    write_clip(tmp_path / "refreshed.ts", 106, fps=25, side=64, options=options)
    whole, part = (
        list(
            media.decode_frames(
                tmp_path / "refreshed.ts", short_side=None, max_fps=None, start_seconds=start
            )
        )
        for start in (0.0, 2.9)
    )
    assert len(part) in (33, 34)  # a transport stream starts 21 ms into its own timeline
    assert [frame.seconds for frame in part] == [f.seconds for f in whole[-len(part) :]]
    for ours, theirs in zip(part, whole[-len(part) :], strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)


@pytest.mark.parametrize("suffix", ["m3u8", "txt"])
def test_a_list_of_other_files_is_no_recording(tmp_path: Path, clip: Path, suffix: str) -> None:
    """Somebody who may upload a clip could otherwise see any film of this machine."""
    secret = shutil.copy(clip, tmp_path / f"secret{clip.suffix}")
    text = {
        "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n",
        "txt": "ffconcat version 1.0\nfile {}\n",
    }[suffix]
    playlist = tmp_path / f"list.{suffix}"
    playlist.write_text(text.format(secret if suffix == "m3u8" else secret.name))
    for read in (
        media.probe,
        lambda path: list(media.decode_frames(path, short_side=None, max_fps=None)),
        lambda path: media.decode_audio(path, sample_rate_hz=8000),
    ):
        with pytest.raises(MediaError, match="not_media: a list of other files"):
            read(playlist)


def test_frames_are_dropped_by_their_times(clip: Path) -> None:
    for fps in (10, 20, 24.9):
        times = [f.seconds for f in media.decode_frames(clip, short_side=32, max_fps=fps)]
        assert len(times) == pytest.approx(4.24 * fps, abs=2)
        assert np.diff(times).max() < 2 / fps
    assert len(list(media.decode_frames(clip, short_side=32, max_fps=25))) == 106


def test_small_pictures_are_not_blown_up(clip: Path) -> None:
    frame = next(media.decode_frames(clip, short_side=128, max_fps=None))
    assert frame.image.shape == (64, 64, 3)


def three_seconds(amplitude: float) -> av.AudioFrame:
    wave = amplitude * np.sin(np.arange(3 * 48_000) * 0.05)
    frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
    return frame


def test_a_cover_picture_that_no_flag_tells_is_no_video(tmp_path: Path) -> None:
    """Many songs have one as a video stream of one frame, as long as it is shown."""
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 96, "yuvj420p"
        image = np.full((96, 96, 3), 90, np.uint8)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(cover.encode())
        container.mux([*sound.encode(three_seconds(0.3)), *sound.encode()])
    record = prepare(path)
    assert len(record.frames) == 1
    assert record.duration_seconds == pytest.approx(3.0, abs=0.05)
    assert np.abs(record.waveform.astype(int)).mean() > 4000
    out = tmp_path / "records"
    assert data_prep(["prepare", str(path), f"--out={out}", "--workers=1"]) == 0
    use = UsableRecords(RecordDataset(out, "train"), SPEC).usable([0])[0]
    assert (use.has_video, use.has_audio) == (False, True)


def test_the_default_of_two_sound_tracks_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("aac", rate=48_000, layout="mono") for _ in range(2)]
        tracks[0].disposition = av.stream.Disposition.comment
        tracks[1].disposition = av.stream.Disposition.default
        for track, amplitude in zip(tracks, (0.0, 0.3), strict=True):
            container.mux([*track.encode(three_seconds(amplitude)), *track.encode()])
    assert np.abs(prepare(path).waveform.astype(int)).mean() > 4000


def test_no_picture_and_no_sound_are_told_apart(tmp_path: Path) -> None:
    silent, blind = tmp_path / "silent.mp4", tmp_path / "blind.wav"
    write_clip(silent, 106, fps=25, audio_codec=None)
    samples = np.tile(8000 * np.sin(np.arange(48_000) * 0.1), (2, 1)).astype(np.int16)
    write_channels(blind, samples, layout="stereo", codec="pcm_s16le")
    assert not prepare(silent).has_audio
    record = prepare(blind)
    assert not record.has_video
    assert (record.height, record.width) == (0, 0)
    assert len(record.waveform) == 16000
    assert np.abs(record.waveform).max() == pytest.approx(8000, rel=0.02)
    blind.write_bytes(blind.read_bytes()[:-10_000])  # inside a packet
    assert refusal(blind) == "truncated"


def tone(hertz: float, amplitude: float = 9000.0) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(SOUND_RATE) / SOUND_RATE)


A, B, NOTHING = tone(440), tone(700, 3000), tone(0)
HISS = 20 * tone(900) / 9000  # a dead cable

# Layout, channels, the sound that is expected, and the kind of note.
CHANNELS = {
    "in phase": ("stereo", [A, A], A, None),
    "unrelated": ("stereo", [A, B], (A + B) / 2, None),
    "wide": ("stereo", [A + B / 2, B / 2 - A / 4], 3 / 8 * A + B / 2, None),
    "inverted": ("stereo", [A, -A], A, "antiphase"),
    "inverted, weaker": ("stereo", [0.7 * A, -A], -A, "antiphase"),
    "left alone": ("stereo", [A, NOTHING], A, "dead_channel"),
    "right alone": ("stereo", [HISS, A], A, "dead_channel"),
    "silence": ("stereo", [NOTHING, NOTHING], NOTHING, "silent"),
    # FL, FR, FC, LFE, BL, BR; FFmpeg's mix has no LFE, and its weights are 1/√2, 1/√2, 1, 0, ½, ½.
    "whole 5.1": (
        "5.1",
        [A, A, B, A, A, A],
        ((2**0.5 + 1) * A + B) / (2**0.5 + 2),
        None,
    ),
    "centre": ("5.1", [NOTHING, NOTHING, A, A, NOTHING, NOTHING], A, "dead_channel"),
    "front": (
        "5.1",
        [A, A, B, NOTHING, NOTHING, NOTHING],
        (2**0.5 * A + B) / (2**0.5 + 1),
        "dead_channel",
    ),
    "inverted front": ("5.1", [A, -A, *[NOTHING] * 4], A, "antiphase"),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_a_mono_mix_never_cancels(tmp_path: Path, name: str) -> None:
    layout, channels, expected, kind = CHANNELS[name]
    samples = np.stack(channels).round().astype(np.int16)
    for path, codec in (("a.wav", "pcm_s16le"), ("a.m4a", "aac")):
        write_channels(tmp_path / path, samples, layout=layout, codec=codec)
        record, notes = prepare_clip(
            entry(tmp_path / path), dataclasses.replace(OPTIONS, sample_rate_hz=SOUND_RATE)
        )
        assert list(notes) == ([kind] if kind else [])
        found = record.waveform[2000:40_000].astype(float)
        wanted = expected[2000:40_000]
        if codec == "aac":  # lossy; of two channels that are equally strong, it may be either
            found *= np.sign(found @ wanted)
            assert np.abs(found - wanted).std() <= 0.05 * 9000
        else:
            assert np.abs(found - wanted).max() <= 2
        if kind:
            assert refusal(tmp_path / path, reject=(kind,)) == kind


def test_a_mono_mix_does_not_depend_on_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # The right channel is not inverted from the start.
    right = np.concatenate([A[: len(A) // 8], -A[len(A) // 8 :]])
    samples = (np.stack([A, right]) + rng.normal(0, 100, (2, len(A)))).astype(np.int16)
    sounds = []
    for block in (64, 1000, 48_000):
        write_channels(tmp_path / "a.mkv", samples, layout="stereo", codec="pcm_s16le", block=block)
        sounds.append(media.decode_audio(tmp_path / "a.mkv", sample_rate_hz=SOUND_RATE))
    for sound in sounds:
        assert sound is not None
        assert list(sound.notes) == ["antiphase"]
        strongest = int(np.square(samples.astype(float)).sum(axis=1).argmax())
        np.testing.assert_array_equal(sound.waveform, samples[strongest])


@pytest.mark.parametrize(
    ("seconds", "gains", "noted"),
    [
        (range(5, 10), (1.0, -1.0), True),
        (range(9, 10), (1.0, -1.0), True),
        (range(5, 10), (0.05, -0.05), True),  # quieter than the rest
        (range(5, 10), (1.0, 0.5), False),
    ],
)
def test_channels_that_cancel_in_a_part_are_not_silent_there(tmp_path, seconds, gains, noted):
    samples = np.tile(A, (2, 10))
    where = slice(seconds.start * SOUND_RATE, seconds.stop * SOUND_RATE)
    samples[:, where] *= np.array(gains)[:, None]
    write_channels(tmp_path / "a.wav", samples.astype(np.int16), layout="stereo", codec="pcm_s16le")
    sound = media.decode_audio(tmp_path / "a.wav", sample_rate_hz=SOUND_RATE)
    assert sound is not None
    assert sound.waveform[where].max() >= 0.04 * 9000
    # A WAV file of two channels has no names for them.
    found = "the mono mix cancels: only channel 1 is used"
    assert sound.notes == ({"antiphase": found} if noted else {})


@pytest.mark.parametrize(("samples", "seconds"), [(7, 1), (10, 1), (17, 1), (25, 2)])
def test_energies_are_of_whole_seconds_whatever_the_blocks(samples: int, seconds: int) -> None:
    both = np.random.default_rng(0).normal(size=(2, samples))
    ends = [10 * n for n in range(1, seconds)]
    expected = [part @ part.T for part in np.split(both, ends, axis=1)]
    for block in (3, 10, samples):
        parts = (both[:, start : start + block] for start in range(0, samples, block))
        np.testing.assert_allclose(channel_energies(parts, sample_rate_hz=10), expected)


@pytest.mark.parametrize(("cancelling", "notes"), [(1, []), (2, ["antiphase"])])
def test_one_second_of_twenty_may_cancel(cancelling: int, notes: list[str]) -> None:
    energies = np.array([[[1, -1], [-1, 1]]] * cancelling + [[[1, 1], [1, 1]]] * (20 - cancelling))
    _, messages = choose_weights(energies.astype(float), np.array([0.5, 0.5]), ["left", "right"])
    assert list(messages) == notes


def test_a_file_shorter_than_its_header_says_is_truncated(clip, monkeypatch):
    """Cut between two packets some containers show no other sign."""
    info = media.probe(clip)
    for stated, reason in ((4.5, None), (5.2, "truncated")):
        monkeypatch.setattr(media, "probe", lambda _, s=stated: info._replace(duration_seconds=s))
        if reason is None:
            assert prepare(clip).duration_seconds == pytest.approx(4.24)
        else:
            assert refusal(clip) == reason
    # Where FFmpeg can only guess the duration from the bit rate, it proves nothing.
    monkeypatch.setattr(media, "probe", lambda _: info._replace(duration_seconds=9.0, format="mp3"))
    assert prepare(clip).duration_seconds == pytest.approx(4.24)


def test_damage_is_refused_with_its_reason(tmp_path: Path, clip: Path) -> None:
    for content in (b"", b"notes, not a film\n" * 100):
        (tmp_path / "x.mp4").write_bytes(content)
        assert refusal(tmp_path / "x.mp4") == "not_media"
    (tmp_path / "text.txt").write_text("FFmpeg would show this as a film of a terminal\n")
    assert refusal(tmp_path / "text.txt") == "not_media"
    (tmp_path / "header.mkv").write_bytes(bytes.fromhex("1a45dfa3"))
    assert refusal(tmp_path / "header.mkv") in ("truncated", "not_media")
    with pytest.raises(MediaError, match="outside"):
        prepare(clip, 99.0)


# A tenth of a second long.
NO_VIEW = {"unordered", "video_90", "video_180", "video_270"}


@needs_real
def test_every_file_is_in_a_training_batch_or_refused_with_a_reason(tmp_path):
    out = tmp_path / "records"
    status = data_prep(["prepare", str(REAL), f"--out={out}", "--short-side=64", "--workers=2"])
    assert status == 3  # complete, with refusals
    refused = listed(out)
    assert {Path(line["path"]).name: line["reason"] for line in refused} == {
        "corrupted.mp4": "damaged",
        "-video-with-dash-.mp4": "too_small",
    }
    spec = experiment.render_spec(pretrain.get_config())
    records = RecordDataset(out, "train")
    # A camera whose lens is covered: black, with noise.
    assert [record.record_id for record in records if record.is_still] == ["no_duration.webm"]
    source = UsableRecords(records, spec)
    left_out = {records.record_ids[i] for i in range(len(records))} - {
        records.record_ids[i] for i in source.indices
    }
    assert {Path(name).stem for name in left_out} == NO_VIEW
    assert len(records) + len(refused) == len(list(REAL.iterdir()))
    size = len(source)
    batches = train_batches(source, spec, seed=0, global_batch_size=size)
    for batch in itertools.islice(iter(batches), 2):
        assert sorted(batch["record_index"]) == sorted(source.indices)
        assert batch["video"].shape == (size, 2, 12, 48, 48, 3)
        assert np.isfinite(batch["spectrogram"]).all()
        for row, index in enumerate(batch["record_index"]):
            use = source.usable(np.flatnonzero(source.indices == index))[0]
            assert batch["has_video"][row] == use.has_video
            assert use.has_audio or not batch["has_audio"][row].any()
            # Real pictures have contrast. A silent view of a sounding record is the floor of the
            # log-mel, and not the zeros that stand for what is missing.
            assert (batch["video"][row].std() > 1) == use.has_video
            assert batch["spectrogram"][row].any() == use.has_audio
    assert batch["has_audio"].any(axis=1).sum() >= 7
