"""Reads from compiled HLO text what devices exchange."""

from __future__ import annotations

import math
import re
from collections import Counter

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<name>all-gather|all-to-all|ragged-all-to-all|all-reduce|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+)\[(?P<dims>[\d,]*)\]")
_BITS = {"pred": 8}


def collective_bytes(hlo: str) -> Counter[str]:
    """Bytes of the results of all collectives on one device, by kind.

    Args:
        hlo: `jax.jit(f).lower(…).compile().as_text()`.

    Returns:
        Kind ("all-gather", …) → bytes. A kind that does not occur counts 0.

    Raises:
        ValueError: On an asynchronous collective, whose result type lists its operands too.
    """
    total: Counter[str] = Counter()
    for match in _COLLECTIVE.finditer(hlo):
        if match["start"]:
            raise ValueError(f"cannot count the asynchronous {match[0]!r}")
        for shape in _SHAPE.finditer(match["type"]):
            bits = _BITS.get(shape["dtype"]) or int(re.sub(r"\D", "", shape["dtype"]))
            dims = [int(dim) for dim in shape["dims"].split(",") if dim]
            total[match["name"]] += math.prod(dims) * bits // 8
    return total
