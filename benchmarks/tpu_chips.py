"""Published data of TPU chips, and the time of exchanges over their interconnect.

Sources: peaks, memory and topology from Google's page of each chip; bandwidth of a link and the
axes that wrap around from "How to Scale Your Model", part 2
(https://jax-ml.github.io/scaling-book/tpus/), which agrees with the totals of those pages: links x
2 directions x one-way bandwidth. Google publishes no clocks. The book gives 1.5 GHz for v5e; the
others follow from peak = units x side^2 x 2 x clock, which also holds for v5e (1.503 GHz).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from avcl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
        peak_flops: bfloat16 operations per second.
        matrix_units: number of matrix units.
        matrix_side: rows and columns of a matrix unit.
        hbm_bytes: memory, with GB of the page taken as 10^9 bytes.
        link_bandwidth: bytes per second of one link in one direction.
        wraps_from: length in chips, or its multiple, of axes that are rings; others are lines.
        source: page of these data.
    """

    peak_flops: float
    matrix_units: int
    matrix_side: int
    hbm_bytes: float
    link_bandwidth: float
    wraps_from: int
    source: str

    @property
    def clock_hz(self) -> float:
        """Clock at which the matrix units reach the peak."""
        return self.peak_flops / (self.matrix_units * self.matrix_side**2 * 2)


CHIPS = {
    "v5e": Chip(197e12, 4, 128, 16e9, 50e9, 16, "https://docs.cloud.google.com/tpu/docs/v5e"),
    # Versions of that page differ: two or four matrix units. The compiler schedules 369,000
    # operations per cycle for a large product, more than two units of this side can do.
    "v6e": Chip(918e12, 4, 256, 32e9, 100e9, 16, "https://docs.cloud.google.com/tpu/docs/v6e"),
    "v5p": Chip(459e12, 8, 128, 95e9, 100e9, 4, "https://docs.cloud.google.com/tpu/docs/v5p"),
}


def chip_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and axes of a topology such as "v5e:4x4".

    Raises:
        UserError: if the topology has another form or an unknown chip.
    """
    name, _, shape = topology.partition(":")
    sides = shape.split("x")
    if name not in CHIPS or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(
            f"topology {topology!r} is not CHIP:AxB or CHIP:AxBxC with CHIP one of "
            f"{', '.join(CHIPS)}, such as v5e:4x4"
        )
    return CHIPS[name], tuple(int(side) for side in sides)


def exchange_seconds(kind: str, received: int, chip: Chip, axes: Sequence[int]) -> float:
    """Minimum seconds of a collective over all chips of a torus, from bandwidth alone.

    Each axis is a ring that works both ways (twice the bandwidth of a link), or a line with half of
    that, as in the book. An all-gather or reduce-scatter transfers (n - 1) / n of the result to
    each chip over all axes at once, an all-reduce twice as much. An all-to-all is limited by the
    links across the middle of the longest axis: half of the chips send half of their data across.
    A permutation is one hop over one link. Latency and waiting for other chips are left out.

    Args:
        kind: opcode of the collective.
        received: bytes of its result on one chip.
        chip: data of the chip.
        axes: number of chips along each axis.

    Raises:
        UserError: if the kind of collective is unknown.
    """
    chips = math.prod(axes)
    if chips == 1:
        return 0.0

    def directions(side: int) -> int:
        return 2 if side % chip.wraps_from == 0 else 1

    axis_bandwidth = sum(directions(side) * chip.link_bandwidth for side in axes if side > 1)
    gather = received * (chips - 1) / chips / axis_bandwidth
    longest = max(axes)
    crossing = chips // longest * directions(longest) * chip.link_bandwidth
    times = {
        "all-gather": gather,
        "reduce-scatter": chips * gather,
        "all-reduce": 2 * gather,
        "all-to-all": received * chips / 4 / crossing,
        "ragged-all-to-all": received * chips / 4 / crossing,
        "collective-permute": received / chip.link_bandwidth,
        "collective-broadcast": received / axis_bandwidth,
    }
    if kind not in times:
        raise UserError(f"no model of the time of {kind!r}: add it to exchange_seconds")
    return times[kind]
