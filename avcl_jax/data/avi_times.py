"""When frames of an AVI file appear: the container does not say, and FFmpeg's guesses err.

An AVI stream is a row of slots, one for each tick of its clock. FFmpeg numbers packets by slot,
which is the order of decoding. Its parser guesses from it when frames appear: one frame late for
MPEG-4 with B-frames, wrong in every frame for H.264 with B-frames. For sound it counts bytes or
packets, which goes wrong by a factor of ten for Vorbis. Players of AVI show the pictures in order,
one to a slot, and play the sound without a break; so do we.
"""

from __future__ import annotations

import heapq
from fractions import Fraction
from typing import Any

# Codecs whose frames are decoded in another order than shown. In the others a packet may show
# nothing (VP8), and its time is the one FFmpeg gives.
_REORDERING = frozenset({"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vc1", "wmv3"})


class AviTimes:
    """Gives the frames of one stream the times of its slots, read from the start of the file."""

    def __init__(self, stream: Any):
        """Takes the stream, of which no packet has been decoded."""
        self._stream = stream
        self._slots: list[int] = []
        self._shown = False
        self._sound_seconds: Fraction | None = None

    def correct(self, packet: Any, frames: list[Any]) -> None:
        """Overwrites the times of the frames that came out when `packet` went in."""
        if self._stream.type == "audio":
            self._count_samples(packet, frames)
        elif self._stream.codec_context.name in _REORDERING:
            self._count_slots(packet, frames)

    def _count_samples(self, packet: Any, frames: list[Any]) -> None:
        if self._sound_seconds is None:
            # The first packet may give no frame yet, but the sound begins with it.
            self._sound_seconds = (packet.pts or 0) * packet.time_base
        for frame in frames:
            frame.time_base = Fraction(1, frame.sample_rate)
            frame.pts = round(self._sound_seconds / frame.time_base)
            self._sound_seconds += frame.samples * frame.time_base

    def _count_slots(self, packet: Any, frames: list[Any]) -> None:
        # A packet that only repeats the frame before it (Xvid's N-VOP) shows none of its own.
        repeats = self._stream.codec_context.name == "mpeg4" and self._shown and not frames
        if packet.dts is not None and not repeats:
            heapq.heappush(self._slots, packet.dts)
        for frame in frames:
            frame.pts = heapq.heappop(self._slots) if self._slots else None
            frame.time_base = self._stream.time_base
            self._shown = True
