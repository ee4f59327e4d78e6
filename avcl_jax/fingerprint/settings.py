"""Settings of an index, fixed when it is made and equal for references and queries, and errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from avcl_jax.errors import UserError
from avcl_jax.export.encoder import MODALITIES

Kind = Literal["auto", "flat", "ivfpq"]
KINDS: tuple[Kind, ...] = ("auto", "flat", "ivfpq")
# Modalities that can be required to match, by name.
REQUIREMENTS = {"video": ("video",), "audio": ("audio",), "both": MODALITIES}
# At most one unrelated query in a hundred may match, a score of 2. The scale is fitted to the
# quartiles of 32 queries, with a standard error of about a fifth: half a point more keeps to the
# limit also where the scale is larger than fitted by that much.
THRESHOLD = 2.5


class FingerprintError(UserError):
    """An index or a query cannot be used; the message names the thing, its value and the fix."""


@dataclasses.dataclass(frozen=True)
class FingerprintSettings:
    """Settings of segments and vectors; docs/fingerprint.md has the measurements."""

    speed: int = 1  # seconds of media per second of the encoder's clip; a whole number
    hop_seconds: float = 0.25  # time from the start of one segment to that of the next
    # Parts of a segment whose features are kept apart, at most as many as the encoder's map has
    # places in time.
    time_bins: int = 3
    dimensions: int = 128  # length of the vectors, at most
    # Playback rates at which a query is tried: seconds of reference per second of query.
    rates: tuple[float, ...] = (1.0, 0.8, 0.9, 1.125, 1.25)
    # "flat" compares with every vector, "ivfpq" with those in the nearest cells, compressed;
    # "auto" is flat below 200,000 segments.
    kind: Kind = "auto"

    def __post_init__(self) -> None:
        """Refuses settings without meaning."""
        if self.speed < 1 or self.speed != int(self.speed):
            raise FingerprintError(f"speed {self.speed} must be a whole number of at least 1")
        if not 0.01 <= self.hop_seconds < math.inf:  # below, there are more segments than frames
            raise FingerprintError(
                f"hop_seconds {self.hop_seconds} must be at least 0.01 and finite"
            )
        if self.time_bins < 1 or self.dimensions < 2:
            raise FingerprintError(
                f"time_bins {self.time_bins} must be at least 1, dimensions {self.dimensions} "
                "at least 2"
            )
        if not self.rates or min(self.rates) <= 0:
            raise FingerprintError(f"rates {self.rates} must be positive, and at least one")
        if self.kind not in KINDS:
            raise FingerprintError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FingerprintSettings:
        """Returns the settings that JSON made of `dataclasses.asdict`."""
        return cls(**{**fields, "rates": tuple(fields["rates"])})
