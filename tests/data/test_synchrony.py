"""Picture and sound of a view cover the same seconds, from a media file to a batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import CropSpec, RenderSpec
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import ViewSpec
from avcl_jax.data_prep.__main__ import main as data_prep

FPS, RATE, SECONDS = 16, 48_000, 12
SPEC = RenderSpec(
    views=ViewSpec(num_frames=12, clip_seconds=0.75, speeds=(1, 2, 4, 8), audio_transform="shared"),
    log_mel=LogMelSpec(16_000, 48, 40, 0.75, 60.0, 7_600.0, 1e-6, 0.0, 1.0),
    crop=CropSpec(image_size=24, min_area=0.6, flip=True, quarter_turns=False),
    spectrogram_on_device=False,
    modalities="audio_visual",
)


def write_flashing(path: Path, rng: np.random.Generator) -> None:
    """White picture with loud sound, black picture with silence, in turns of 0.5 to 1.5 s."""
    edges = np.cumsum(rng.uniform(0.5, 1.5, size=30))
    edges = np.round(edges * FPS) / FPS  # on picture borders, so that truth is one pattern

    def on(times: np.ndarray) -> np.ndarray:
        return np.searchsorted(edges, times + 1e-9, side="right") % 2 == 1

    lights = np.where(on(np.arange(SECONDS * FPS) / FPS), 235, 16)
    times = np.arange(SECONDS * RATE) / RATE
    write_mp4(
        path,
        ((n / FPS, np.full((64, 64, 3), x, np.uint8)) for n, x in enumerate(lights)),
        (rng.normal(0, 6000, len(times)) * on(times)).clip(-32768, 32767).astype(np.int16),
        fps=FPS,
        sample_rate_hz=RATE,
        audio_bits_per_second=128_000,
        video_options={},
    )


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flashing")
    (folder / "media").mkdir()
    for number in range(8):
        write_flashing(folder / "media" / f"{number}.mp4", np.random.default_rng(number))
    arguments = [str(folder / "media"), f"--out={folder / 'records'}", "--workers=1"]
    assert data_prep(["prepare", *arguments]) == 0
    source = UsableRecords(RecordDataset(folder / "records", "train"), SPEC)
    return list(
        itertools.islice(iter(train_batches(source, SPEC, seed=0, global_batch_size=8)), 60)
    )


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("speed", range(4))
def test_flash_and_sound_coincide_at_every_speed_and_direction(batches, speed, direction):
    """Shifting the sound by one picture agrees less, and hardly a picture disagrees."""
    agreement = {shift: [] for shift in (-1, 0, 1)}
    views = 0
    for batch in batches:
        chosen = (batch["video_speed"] == speed) & (batch["video_direction"] == direction)
        np.testing.assert_array_equal(batch["audio_speed"], batch["video_speed"])
        np.testing.assert_array_equal(batch["audio_direction"], batch["video_direction"])
        for clip, spectrogram in zip(
            batch["video"][chosen], batch["spectrogram"][chosen], strict=True
        ):
            views += 1
            light = clip.mean(axis=(1, 2, 3)) > 128
            # The four sound frames of a picture begin with it; reversed, they end with it.
            loud = spectrogram.mean(axis=1)[direction * 3 :: 4] > -8
            for shift in agreement:
                inside = slice(max(shift, 0), 12 + min(shift, 0))
                moved = slice(max(-shift, 0), 12 + min(-shift, 0))
                agreement[shift].append((light[inside] == loud[moved]).mean())
    assert views > 60
    means = {shift: np.mean(values) for shift, values in agreement.items()}
    assert means[0] > 0.97, means
    assert max(means[-1], means[1]) < means[0] - 0.02, means
