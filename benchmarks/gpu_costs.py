"""Published data of GPUs, and what a program compiled for one costs at least, from its HLO text.

The GPU compiler estimates no time. An operation takes at least as long as its multiplications at
the peak of the matrix units, and as its arguments and results at the bandwidth of the memory; the
sum over all operations is the time of the roofline model. Operations that overlap are added up.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from avcl_jax.errors import UserError
from benchmarks import hlo_costs
from benchmarks.hlo_costs import Instruction, Module


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: name that the driver reports.
        peak_flops: bfloat16 operations per second, dense.
        bandwidth: bytes per second of the memory.
        memory_bytes: memory that the driver reports.
        link_bandwidth: bytes per second that one GPU sends to others of its host.
        capability: CUDA compute capability.
        cores: number of multiprocessors.
        fpus_per_core: units for float32 of a multiprocessor.
        clock_ghz: largest clock.
        shared_kb: shared memory of a multiprocessor.
        l2_bytes: size of the second cache.
        source: page of these data.
    """

    name: str
    peak_flops: float
    bandwidth: float
    memory_bytes: int
    link_bandwidth: float
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    shared_kb: int
    l2_bytes: int
    source: str

    @property
    def target(self) -> str:
        """Description that XLA compiles for (stream_executor.GpuTargetConfigProto)."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152
              shared_memory_per_core: {1024 * self.shared_kb}
              shared_memory_per_block_optin: {1024 * (self.shared_kb - 1)}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 7 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.name}"
        """


# What XLA reports of them, in xla/backends/gpu/target_config/specs of its repository, and the
# peaks of the data sheets.
GPUS = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        peak_flops=989e12,
        bandwidth=3.35232e12,
        memory_bytes=84_942_979_072,
        link_bandwidth=450e9,
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        shared_kb=228,
        l2_bytes=52_428_800,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        peak_flops=312e12,
        bandwidth=2.03904e12,
        memory_bytes=85_100_068_864,
        link_bandwidth=300e9,
        capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        shared_kb=164,
        l2_bytes=41_943_040,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
}


def gpu_of(topology: str) -> tuple[Gpu, int]:
    """GPU and number of them in a topology such as "h100:8".

    Raises:
        UserError: if the topology has another form or an unknown GPU.
    """
    name, _, count = topology.partition(":")
    if name not in GPUS or not count.isdecimal() or not int(count):
        raise UserError(
            f"topology {topology!r} is not GPU:NUMBER with GPU one of {', '.join(GPUS)}, such as "
            "h100:8"
        )
    return GPUS[name], int(count)


@dataclasses.dataclass
class Costs:
    """Costs of a program on one GPU.

    Attributes:
        seconds: time of the roofline model.
        seconds_by_kind: the same for convolutions and products (by what bounds them), operations
            that change a layout, and all others, which read and write memory.
        bytes: arguments and results of all operations.
        relayout_bytes: the same of those that transpose or copy an array, whatever else they
            compute.
        convolution_flops: two for each multiplication of a convolution.
        channels_last_flops: those with channels last and bfloat16 operands.
        exchange_seconds: minimum time of all collectives at the bandwidth of the links.
        overlapped_seconds: the part of it for which operations are scheduled between start and end.
    """

    seconds: float = 0.0
    seconds_by_kind: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    bytes: int = 0
    relayout_bytes: int = 0
    convolution_flops: int = 0
    channels_last_flops: int = 0
    exchange_seconds: float = 0.0
    overlapped_seconds: float = 0.0


_CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv(\w+)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def _sizes(array: str) -> list[int]:
    match = _ARRAY.search(array)
    return [int(size) for size in match[1].split(",") if size] if match else []


def _convolution(instruction: Instruction, kind: str, types: dict[str, str]) -> tuple[int, bool]:
    """FLOPs of a call of cuDNN, and whether it has channels last and bfloat16 operands.

    Its labels are those of the forward convolution: input, kernel and output.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels in HLO: {instruction.name}")
    first, second = (types[name] for name in instruction.operands[:2])
    if kind == "BackwardInput":  # of the output's gradient and the kernel
        kernel, output = second, first
    elif kind == "BackwardFilter":  # of the input and the output's gradient
        kernel, output = instruction.type, second
    else:
        kernel, output = second, instruction.type
    features = _sizes(output)[labels[3].index("f")]
    flops = 2 * math.prod(_sizes(kernel)) * math.prod(_sizes(output)) // features
    last = labels[1].endswith("f") and labels[3].endswith("f")
    return flops, last and first.startswith("bf16") and second.startswith("bf16")


def _product(instruction: Instruction, types: dict[str, str]) -> int:
    contracted = _CONTRACTED.search(instruction.attributes)
    sizes = _sizes(types[instruction.operands[0]])
    depth = math.prod(sizes[int(axis)] for axis in contracted[1].split(",")) if contracted else 1
    return 2 * math.prod(_sizes(instruction.type)) * depth


def _exchange_seconds(instruction: Instruction, gpu: Gpu, gpus: int) -> float:
    """Minimum seconds of a collective in a ring of GPUs of one host."""
    received = hlo_costs.num_bytes(hlo_costs.shapes(instruction.type))
    rounds = 2 if instruction.opcode.startswith("all-reduce") else 1
    if instruction.opcode.startswith("reduce-scatter"):
        rounds = gpus
    return rounds * received * (gpus - 1) / gpus / gpu.link_bandwidth


def costs(module: Module, gpu: Gpu, gpus: int) -> Costs:
    """Costs of a program, loops as often as they run, of a conditional all branches."""
    found = Costs()

    def visit(name: str, times: int) -> None:
        types = {instruction.name: instruction.type for instruction in module.computations[name]}
        began: dict[str, float] = {}  # name of an asynchronous collective → time at its start
        for instruction in module.computations[name]:
            opcode = instruction.opcode
            if opcode in ("while", "call", "conditional", "async-start"):
                inner = (module.trips(instruction) or 1) if opcode == "while" else 1
                for called in instruction.called + instruction.branches:
                    visit(called, times * inner)
            elif opcode.removesuffix("-start") in hlo_costs.COLLECTIVES and opcode.endswith(
                "-start"
            ):
                began[instruction.name] = found.seconds
            elif opcode.removesuffix("-done") in hlo_costs.COLLECTIVES:
                needed = _exchange_seconds(instruction, gpu, gpus)
                since = [began[name] for name in instruction.operands if name in began]
                between = (found.seconds - since[0]) / times if since else 0.0
                found.exchange_seconds += times * needed
                found.overlapped_seconds += times * min(needed, between)
            elif opcode not in hlo_costs.FREE:
                add(instruction, types, times)

    def add(instruction: Instruction, types: dict[str, str], times: int) -> None:
        arrays = [types[name] for name in instruction.operands if name in types]
        flops, relayout = 0, instruction.opcode in ("copy", "transpose")
        call = _CONVOLUTION.search(instruction.attributes)
        # The second result of cuDNN is room that it may use.
        arrays.append(instruction.type.split(", u8[")[0] if call else instruction.type)
        moved = hlo_costs.num_bytes(hlo_costs.shapes("".join(arrays)))
        if call:
            flops, good = _convolution(instruction, call[1], types)
            found.convolution_flops += times * flops
            found.channels_last_flops += times * flops * good
        for called in instruction.called if instruction.opcode == "fusion" else ():
            inside = module.computations[called]
            inner = {line.name: line.type for line in inside}
            flops += sum(_product(line, inner) for line in inside if line.opcode == "dot")
            relayout |= any(line.opcode in ("copy", "transpose") for line in inside)
        compute, memory = flops / gpu.peak_flops, moved / gpu.bandwidth
        kind = "layout" if relayout else "other memory"
        if flops:
            kind = "matrix units" if compute > memory else "memory of convolutions and products"
        found.bytes += times * moved
        found.relayout_bytes += times * moved * relayout
        found.seconds += times * max(compute, memory)
        found.seconds_by_kind[kind] += times * max(compute, memory)

    visit(module.entry, 1)
    return found
