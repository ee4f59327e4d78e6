"""Reads cycles, exchanges and convolutions of a program on one device from compiled HLO text.

The TPU compiler writes `estimated_cycles` into the operations of its optimised program. They are
summed over the entry computation, the body of a loop with its number of iterations. Collectives,
sorts and copies that overlap with the computation have no estimate and are listed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter"),
    *("collective-permute", "collective-broadcast"),
)
# Names and copies, and transfers that overlap with the computation: without cost of their own.
FREE = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
        *("copy-start", "copy-done", "slice-start", "slice-done", "async-done", "async-update"),
        *("while", "conditional", "call", "async-start", "partition-id", "replica-id"),
        *(f"{kind}{suffix}" for kind in COLLECTIVES for suffix in ("", "-start", "-done")),
    )
)
# Joins the parts of an array without moving them.
_NOTHING = 'custom_call_target="ConcatBitcast"'
_NAME = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = ")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_ALIASED = re.compile(r"\((\d+), \{[^}]*\}, (?:may|must)-alias\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: name of the result.
        type: type of the result, with layouts.
        opcode: "fusion", "all-reduce-start", …
        arguments: text in the parentheses: names, or the value of a constant.
        attributes: text behind the parentheses.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Place in the traced program; "" if unknown."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, without the `branches` of a conditional."""
        return _CALLED.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """Names of the computations of a conditional, which runs one of them."""
        matches = _BRANCHES.findall(self.attributes)
        return [name.strip(" %") for many, one in matches for name in (many or one).split(",")]

    @property
    def operands(self) -> list[str]:
        """Names of the arguments."""
        return _OPERAND.findall(self.arguments)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        header: first line.
        entry: name of the entry computation.
        computations: name → instructions.
    """

    header: str
    entry: str
    computations: dict[str, list[Instruction]]

    def trips(self, loop: Instruction) -> int | None:
        """Number of iterations of a loop; None if unknown.

        Other compilers write it into the loop. The TPU's does not, but JAX's loops of known
        length (scan, map, fori_loop from 0) increment a counter while it is less than a constant.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        lines = self.computations[condition[1]] if condition else []
        if not lines or lines[-1].opcode != "compare" or "direction=LT" not in lines[-1].attributes:
            return None
        by_name = {line.name: line for line in lines}
        counter, bound = (by_name.get(name) for name in lines[-1].operands)
        if counter is None or bound is None or counter.opcode != "get-tuple-element":
            return None
        return int(bound.arguments) if bound.opcode == "constant" else None

    @property
    def aliased_parameters(self) -> set[int]:
        """Numbers of the parameters whose memory a result reuses, that is, donated parameters."""
        return {int(number) for number in _ALIASED.findall(self.header)}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: one of `COLLECTIVES`.
        shapes: (dtype, elements) of each array that a device receives.
        times: number of runs.
        op_name: see `Instruction.op_name`.
    """

    kind: str
    shapes: tuple[tuple[str, int], ...]
    times: int
    op_name: str

    @property
    def bytes(self) -> int:
        """Bytes of the results of all runs on one device."""
        return self.times * num_bytes(self.shapes)


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Cycles of a program.

    Attributes:
        total: sum of all estimates.
        by_op_name: the same by `Instruction.op_name`.
        uncounted: opcode → bytes of the results of operations without an estimate.
        loops_of_unknown_length: number of loops that count as one iteration.
    """

    total: int
    by_op_name: Counter[str]
    uncounted: Counter[str]
    loops_of_unknown_length: int


def bits(dtype: str) -> int:
    """Bits of a number, which are part of the name of its type."""
    if dtype == "pred":
        return 8
    match = re.search(r"\d+", dtype)
    if match is None:
        raise ValueError(f"unknown type {dtype!r} in HLO")
    return int(match[0])


def shapes(text: str) -> tuple[tuple[str, int], ...]:
    """(dtype, elements) of every array in a type."""
    return tuple(
        (match["dtype"], math.prod(int(size) for size in match["dims"].split(",") if size))
        for match in _SHAPE.finditer(text)
    )


def num_bytes(arrays: tuple[tuple[str, int], ...]) -> int:
    """Bytes of arrays (dtype, elements), without padding."""
    return sum(count * bits(dtype) // 8 for dtype, count in arrays)


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]!r}")


def _instruction(line: str, name: str, start: int) -> Instruction:
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing - 1]
    return Instruction(name, line[start:end], line[end:opening].strip(), arguments, line[closing:])


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: if it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry, header = "", ""
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif current is None:
            match = _HEADER.fullmatch(line)
            if match and " -> " in line:
                current = computations[match["name"]] = []
                entry = match["name"] if match["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif match := _NAME.match(line):
            current.append(_instruction(line, match["name"], match.end()))
    if not entry:
        raise ValueError("no ENTRY computation: is this the text of a compiled program?")
    return Module(header, entry, computations)


def _runs(module: Module, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    """Instructions below a computation with their number of runs, of branches all."""
    for instruction in module.computations[name]:
        yield instruction, times
        opcode = instruction.opcode
        if opcode in ("async-update", "async-done"):
            continue  # these name the computation that the start has run
        if opcode != "call" and "to_apply=" in instruction.attributes:
            continue  # the function that a reduction applies to two numbers
        trips = (module.trips(instruction) or 1) if opcode == "while" else 1
        for called in instruction.called + instruction.branches:
            yield from _runs(module, called, times * trips)


def collectives(module: Module) -> list[Collective]:
    """All exchanges of a program, each once, also if several operations carry it out.

    A pair of start and done counts as its done, whose type is the result. If the TPU compiler
    weaves a collective into another computation, it repeats it there under one `chain_id`.
    """
    exchanges: list[Collective] = []
    chains: set[tuple[str, str]] = set()
    for instruction, times in _runs(module, module.entry, 1):
        kind = instruction.opcode.removesuffix("-done")
        if kind not in COLLECTIVES:
            continue
        if chain := _CHAIN.search(instruction.attributes):
            if (kind, chain[1]) in chains:
                continue
            chains.add((kind, chain[1]))
        exchanges.append(Collective(kind, shapes(instruction.type), times, instruction.op_name))
    return exchanges


def cycles(module: Module) -> Cycles:
    """Sums the estimates of all operations; of a conditional's branches, the most expensive."""
    unknown = 0
    known: dict[str, tuple[Counter[str], Counter[str]]] = {}

    def count(name: str) -> tuple[Counter[str], Counter[str]]:
        nonlocal unknown
        if name in known:
            return known[name]
        counted: Counter[str] = Counter()
        uncounted: Counter[str] = Counter()
        for instruction in module.computations[name]:
            estimate = _CYCLES.search(instruction.attributes)
            if estimate:
                counted[instruction.op_name] += int(estimate[1])
            elif instruction.opcode not in FREE and _NOTHING not in instruction.attributes:
                uncounted[instruction.opcode] += num_bytes(shapes(instruction.type))
            if instruction.opcode == "conditional":
                branches = [count(branch) for branch in instruction.branches]
                most, without = max(branches, key=lambda costs: costs[0].total())
                counted, uncounted = counted + most, uncounted + without
            elif instruction.opcode in ("while", "call", "async-start"):
                times = 1
                if instruction.opcode == "while":
                    trips = module.trips(instruction)
                    unknown += trips is None
                    times = trips or 1
                for called in instruction.called:
                    inner, without = count(called)
                    for op_name, value in inner.items():
                        counted[op_name] += times * value
                    uncounted += without
        known[name] = counted, uncounted
        return known[name]

    counted, uncounted = count(module.entry)
    return Cycles(counted.total(), counted, uncounted, unknown)


def convolution_types(module: Module, op_name: str) -> Counter[tuple[str, str, int]]:
    """Counts convolutions whose `op_name` contains a text: dtypes of operands, dimensions."""
    counts: Counter[tuple[str, str, int]] = Counter()
    for instructions in module.computations.values():
        types = {instruction.name: instruction.type for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode == "convolution" and op_name in instruction.op_name:
                left, right = (shapes(types[name])[0][0] for name in instruction.operands)
                dimensions = re.search(r"\[([\d,]*)\]", instruction.type)
                counts[left, right, dimensions[1].count(",") - 1 if dimensions else 0] += 1
    return counts
