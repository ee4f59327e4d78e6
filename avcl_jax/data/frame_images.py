"""Conversion of decoded frames to scaled images: RGB as players show it, upright, square pixels."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.filter import Graph
from av.video.reformatter import (
    ColorPrimaries,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from avcl_jax.data.media_streams import MediaError

# Matrix coefficients (ITU-T H.273) that FFmpeg converts; constant luminance as its neighbour.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_UNTAGGED = (0, 2, 3)  # RGB, which YUV cannot be; unspecified; reserved
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
# Scaled first, because a colour table is looked up for every pixel. HDR10+ metadata change with
# every scene, and FFmpeg would compute the table again, 2 s each time.
_TONE_MAP = (
    ("sidedata", "mode=delete:type=DYNAMIC_HDR_PLUS"),
    ("scale", "w={width}:h={height}:flags=area"),
    ("format", "pix_fmts=rgb48le"),
    ("scale", "out_primaries=bt709:out_transfer=bt709:intent=perceptual"),
    ("format", "pix_fmts=rgb24"),
    ("buffersink", None),
)


class FrameImages:
    """Converts the frames of one stream, which must all have one size and pixel aspect ratio."""

    def __init__(self, stream: Any, short_side: int | None):
        """Takes a video stream, and the short side to scale down to; None keeps the size."""
        self._decoder = stream.codec_context
        self._short_side = short_side
        # The container's aspect ratio applies to the whole file, whatever the stream says inside.
        self._header_aspect = stream.sample_aspect_ratio
        self._follows_stream = self._header_aspect == self._decoder.sample_aspect_ratio
        # Kept over all frames: setting one up takes twenty times as long as a 64x64 frame.
        self._reformatter = VideoReformatter()
        self._tone_map: Graph | None = None
        self._shape: tuple[int, int, Fraction] | None = None

    def check_shape(self, frame: Any, seconds: float) -> None:
        """Compares a frame with the first one.

        Raises:
            MediaError: if its size or pixel aspect ratio differs.
        """
        aspect = self._decoder.sample_aspect_ratio if self._follows_stream else None
        shape = (frame.width, frame.height, aspect or self._header_aspect or Fraction(1))
        if self._shape is None:
            self._shape = shape
            self._size = _stored_size(*shape, self._short_side)
            self._orientation = _orientation(frame)
        elif shape != self._shape:
            before, after = (f"{w}x{h} (pixel aspect {a})" for w, h, a in (self._shape, shape))
            raise MediaError(
                "mixed_sizes", f"frames change from {before} to {after} at {seconds:.2f} s"
            )

    def __call__(self, frame: Any) -> np.ndarray:
        """Returns a frame that `check_shape` has seen as uint8 [height, width, 3]."""
        is_hdr = frame.color_trc in _HDR
        matrix = None if frame.format.is_rgb else _matrix(frame, is_hdr=is_hdr)
        if is_hdr:
            image = self._to_sdr(frame, matrix)
        else:
            image = self._reformatter.reformat(
                frame,
                width=self._size[0],
                height=self._size[1],
                format="rgb24",
                src_colorspace=matrix,
                dst_colorspace=matrix,
                interpolation=Interpolation.AREA,
                threads=1,
            ).to_ndarray()
        transpose, flip_rows, flip_columns = self._orientation
        if transpose:
            image = image.transpose(1, 0, 2)
        image = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(image)

    def _to_sdr(self, frame: Any, matrix: Colorspace | None) -> np.ndarray:
        """Maps PQ or HLG to BT.709 by FFmpeg's perceptual tone mapping."""
        if matrix is not None:
            frame.colorspace = matrix
        if frame.color_primaries == ColorPrimaries.UNSPECIFIED:
            frame.color_primaries = ColorPrimaries.BT2020
        if self._tone_map is None:
            width, height = self._size
            self._tone_map = Graph()
            last = self._tone_map.add(
                "buffer",
                f"width={frame.width}:height={frame.height}:pix_fmt={frame.format.name}:"
                f"time_base={frame.time_base}:colorspace={int(frame.colorspace)}:"
                f"range={int(frame.color_range)}",
            )
            for name, arguments in _TONE_MAP:
                arguments = arguments and arguments.format(width=width, height=height)
                following = self._tone_map.add(name, arguments)
                last.link_to(following)
                last = following
            self._tone_map.configure()
        self._tone_map.push(frame)
        return self._tone_map.pull().to_ndarray()


def _matrix(frame: Any, *, is_hdr: bool) -> Colorspace:
    """Returns the matrix of a YUV frame: as tagged, else as players guess it.

    mpv and libplacebo (`pl_color_system_guess_ycbcr`) take BT.709 from 1280 columns or 577 lines
    on. Browsers look at the lines alone (720), and so show a 1280x536 film in other colours.
    """
    if frame.colorspace in _MATRICES:
        return _MATRICES[frame.colorspace]
    if frame.colorspace not in _UNTAGGED:
        raise MediaError(
            "unsupported_codec",
            f"colour matrix {int(frame.colorspace)} of ITU-T H.273 is not supported",
        )
    if is_hdr:
        return Colorspace.BT2020
    is_hd = frame.width >= 1280 or frame.height > 576
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Returns (transpose, flip rows, flip columns) that make a frame upright, in this order."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5]
            if abs(int(a)) + abs(int(d)) >= abs(int(b)) + abs(int(c)):
                return False, d < 0, a < 0
            return True, b < 0, c < 0
    return False, False, False


def _stored_size(
    width: int, height: int, aspect: Fraction, short_side: int | None
) -> tuple[int, int]:
    """Returns width and height to scale to, before rotation; never larger than displayed."""
    stretch = float(aspect) if 0.1 <= aspect <= 10 else 1.0  # nonsense in the header
    wide, high = width * stretch, float(height)
    scale = min(1.0, short_side / min(wide, high)) if short_side else 1.0
    return max(1, round(wide * scale)), max(1, round(high * scale))
