"""How a stored picture becomes one that is upright, with square pixels, of the wanted size."""

from __future__ import annotations

from typing import Any

import numpy as np


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Returns (transpose, flip rows, flip columns) that make a frame upright, in this order."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5]
            if abs(int(a)) + abs(int(d)) >= abs(int(b)) + abs(int(c)):
                return False, d < 0, a < 0
            return True, b < 0, c < 0
    return False, False, False


def stored_size(stream: Any, frame: Any, short_side: int | None) -> tuple[int, int]:
    """Returns width and height to scale to, before rotation; never larger than displayed."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= aspect <= 10:  # nonsense in the header
        aspect = 1.0
    width, height = frame.width * aspect, float(frame.height)
    scale = min(1.0, short_side / min(width, height)) if short_side else 1.0
    return max(1, round(width * scale)), max(1, round(height * scale))
