"""Colours, pixel shapes and sizes of frames, against what was computed before they were encoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.media import MediaError, decode_frames
from tests.data.synthetic_media import write_patches, write_stretches

PATCHES = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)], np.uint8)
# Luma weights of red and blue: ITU-R BT.601, BT.709, FCC, SMPTE 240M and BT.2020.
WEIGHTS = {
    "601": (0.299, 0.114),
    "709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "240": (0.212, 0.087),
    "2020": (0.2627, 0.0593),
}


def to_yuv(rgb: np.ndarray, matrix: str, *, bits: int = 8, full_range: bool = False) -> np.ndarray:
    """Converts [patches, 3] in 0 … 1 as the standards write it."""
    red, blue = WEIGHTS[matrix]
    luma = rgb @ [red, 1 - red - blue, blue]
    chroma = [(rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)]
    unit = 1 << (bits - 8)
    scale, offset = (255, 0) if full_range else (219, 16)
    spread = 255 if full_range else 224
    planes = [scale * luma + offset, *(spread * plane + 128 for plane in chroma)]
    return np.round(np.stack(planes, -1) * unit).astype(np.uint16)


def shown_patches(path: Path, count: int) -> np.ndarray:
    (image, *_) = (f.image for f in decode_frames(path, short_side=None, max_fps=None))
    width = image.shape[1] // count
    return image[image.shape[0] // 2, width // 2 :: width][:count].astype(int)


COLOURS = {
    "tagged BT.601, large": ("601", {"colorspace": 6}, (1280, 720)),
    "tagged BT.709, small": ("709", {"colorspace": 1}, (96, 64)),
    "tagged FCC": ("fcc", {"colorspace": 4}, (96, 64)),
    "tagged BT.601 of PAL, large": ("601", {"colorspace": 5}, (1280, 720)),
    "tagged SMPTE 240M": ("240", {"colorspace": 7}, (96, 64)),
    "tagged BT.2020": ("2020", {"colorspace": 9}, (96, 64)),
    "tagged BT.2020, constant luminance": ("2020", {"colorspace": 10}, (96, 64)),
    "untagged, 576 lines": ("601", {}, (96, 576)),
    "untagged, 720 lines": ("709", {}, (96, 720)),
    "untagged, cropped from 720 lines": ("709", {}, (1280, 536)),
    "untagged, reserved": ("601", {"colorspace": 3}, (96, 64)),
    "untagged, full range": ("709", {"color_range": 2}, (96, 720)),
    "tagged, full range": ("709", {"colorspace": 1, "color_range": 2}, (96, 64)),
}


@pytest.mark.parametrize("case", COLOURS)
def test_colours_are_those_that_a_player_shows(tmp_path: Path, case: str) -> None:
    matrix, tags, size = COLOURS[case]
    stored = to_yuv(PATCHES / 255, matrix, full_range=tags.get("color_range") == 2)
    write_patches(tmp_path / "a.mkv", stored, size=size, tags=tags)
    shown = shown_patches(tmp_path / "a.mkv", len(PATCHES))
    np.testing.assert_allclose(shown, PATCHES, atol=3)


def test_a_matrix_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    write_patches(tmp_path / "a.mkv", to_yuv(PATCHES / 255, "709"), tags={"colorspace": 8})
    with pytest.raises(MediaError, match="unsupported_codec: colour matrix 8"):
        shown_patches(tmp_path / "a.mkv", len(PATCHES))


def pq(nits: np.ndarray) -> np.ndarray:
    """Inverse electro-optical transfer function of SMPTE ST 2084."""
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """The same of ITU-R BT.2100 HLG, of grey on a display of 1,000 nits (system gamma 1.2)."""
    scene = (nits / 1000) ** (1 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


@pytest.mark.parametrize(
    ("transfer", "curve", "tagged"), [(16, pq, False), (18, hlg, True)], ids=["pq", "hlg"]
)
def test_high_dynamic_range_is_mapped_to_what_a_screen_shows(tmp_path, transfer, curve, tagged):
    """Greys, and a green of BT.709, which BT.2020 stores with red and blue in it."""
    nits = np.array([0.0, 5, 50, 100, 203, 1000])
    green = np.array([[0.3293, 0.9195, 0.0880]]) * 100  # BT.709's in BT.2020's primaries: BT.2087
    signal = curve(np.concatenate([np.repeat(nits[:, None], 3, 1), green]))
    tags = {"color_trc": transfer} | ({"colorspace": 9, "color_primaries": 9} if tagged else {})
    path = tmp_path / "a.mkv"
    write_patches(path, to_yuv(signal, "2020", bits=10), tags=tags, pixel_format="yuv444p10le")
    *greys, (red, most, blue) = shown_patches(path, len(signal))
    assert np.ptp(greys, axis=1).max() <= 3  # grey stays grey
    black, dark, *_, half, white, brightest = np.mean(greys, axis=1)
    assert black <= 2
    assert 10 < dark < 60
    # Paper white (BT.2408: 203 nits) has room above it, and looks white all the same.
    assert 90 < half < white - 20
    assert 140 < white < brightest - 20
    assert brightest > 200
    assert np.all(np.diff(np.mean(greys, axis=1)) > 0)
    assert most > 90
    assert max(red, blue) < 0.55 * most  # stored: 0.8


CHANGES = {
    "size": (((96, 64), Fraction(1)), ((64, 128), Fraction(1))),
    "pixel shape": (((96, 64), Fraction(1)), ((96, 64), Fraction(16, 11))),
}


@pytest.mark.parametrize("case", CHANGES)
def test_frames_of_two_shapes_are_refused_and_never_squeezed(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.ts"
    write_stretches(path, CHANGES[case], seconds=1.0)
    with pytest.raises(MediaError, match=r"mixed_sizes: frames change from 96x64 .* at 1\.00 s"):
        list(decode_frames(path, short_side=None, max_fps=5))
    for start, end, (size, aspect) in zip((0.0, 1.0), (1.0, None), CHANGES[case], strict=True):
        interval = {"start_seconds": start, "end_seconds": end}
        frames = list(decode_frames(path, short_side=None, max_fps=None, **interval))
        assert len(frames) == 25
        assert frames[0].image.shape[:2] == (size[1], round(size[0] * aspect))
