"""The reader of compiled HLO on small programs, whose costs are known by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from avcl_jax.errors import UserError
from avcl_jax.models.convolution import convolve
from benchmarks import hlo_costs
from benchmarks.gpu_costs import GPUS, costs, gpu_of
from benchmarks.model_flops import matrix_flops
from benchmarks.tpu_chips import CHIPS, chip_of, exchange_seconds

# As the TPU compiler writes it: layouts with tiles, tuples with comments, a loop, a conditional,
# asynchronous pairs, and a collective woven into several computations under one chain_id.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, \
{}, must-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b), backend_config={"estimated_cycles":"999999"}
}

%woven_start (p: u16[8,128]) -> (u16[32,128], u32[]) {
  %p = u16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.0 = u16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}, frontend_attributes={\
chain_id="7"}, metadata={op_name="jit(step)/jvp()/shard_map/all_gather"}
  ROOT %start = (u16[32,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%ag.0), \
custom_call_target="AsyncCollectiveStart"
}

%woven_done (p.1: u16[8,128]) -> u16[32,128] {
  %p.1 = u16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = u16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), dimensions={0}, \
frontend_attributes={chain_id="7"}, metadata={op_name="jit(step)/jvp()/shard_map/all_gather"}
}

%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %v = f32[16]{0:T(128)} get-tuple-element(%s), index=1
  %w = f32[16]{0:T(128)} fusion(%v), kind=kLoop, calls=%sum, metadata={op_name="jit(step)/loop"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %x = f32[16]{0:T(128)} all-reduce(%w), replica_groups={{0,1}}, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%i, %x)
}

%test (s.1: (s32[], f32[16])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %i.1), direction=LT, backend_config={\
"estimated_cycles":"3"}
}

%cheap (c: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} copy(%c), backend_config={"estimated_cycles":"10"}
}

%dear (d: f32[4]) -> f32[4] {
  ROOT %d = f32[4]{0} copy(%d), backend_config={"estimated_cycles":"50"}
}

ENTRY %main (x: bf16[2,4,4,8], k: bf16[3,3,8,8], f: f32[3,3,8,8]) -> f32[4] {
  %x = bf16[2,4,4,8]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %f = f32[3,3,8,8]{3,2,1,0:T(8,128)} parameter(2)
  %conv = f32[2,4,4,8]{3,2,1,0:T(8,128)S(1)} convolution(%x, %k), window={size=3x3}, \
metadata={op_name="jit(step)/conv_general_dilated"}, backend_config={"estimated_cycles":"1000"}
  %silent = f32[2,4,4,8]{3,2,1,0:T(8,128)} convolution(%conv, %f), window={size=3x3}, \
metadata={op_name="jit(step)/conv_general_dilated"}, backend_config={"estimated_cycles":"4000"}
  %one = (u16[32,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%woven_start
  %two = u16[32,128]{1,0} fusion(%one), kind=kCustom, calls=%woven_done
  %state = (s32[]{:T(128)}, /*index=1*/f32[16]{0:T(128)}) tuple(%x, %x)
  %loop = (s32[]{:T(128)}, f32[16]{0:T(128)}) while(%state), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %choice = f32[4]{0} conditional(%x, %x, %x), branch_computations={%cheap, %dear}
  %begun = ((f32[2,3]{1,0}), f32[4,3]{1,0}) all-gather-start(%f), dimensions={0}
  %ended = f32[4,3]{1,0} all-gather-done(%begun)
  %both = (f32[10]{0}, bf16[6]{0}) all-reduce(%f, %k), replica_groups={}, to_apply=%sum
  %order = (f32[100]{0}, s32[100]{0}) sort(%f, %f), dimensions={0}, to_apply=%sum
  %whole = f32[64]{0} custom-call(%f, %f), custom_call_target="ConcatBitcast"
  %cropped = f32[25]{0} custom-call(%f), custom_call_target="ZeroCrop"
  ROOT %out = f32[4]{0} copy(%choice), backend_config={"estimated_cycles":"7"}
}
"""


@pytest.fixture(scope="module")
def module() -> hlo_costs.Module:
    return hlo_costs.parse(PROGRAM)


def test_donated_parameters_are_those_that_a_result_takes_over(module) -> None:
    assert module.entry == "main"
    assert module.aliased_parameters == {0, 3}


def test_loops_count_as_often_as_they_run_and_conditionals_their_dearest_branch(module) -> None:
    found = hlo_costs.cycles(module)
    # Not what is inside a fusion, nor the addition of a reduction.
    assert found.total == 1000 + 4000 + 5 * (100 + 3) + 50 + 7
    assert found.by_op_name["jit(step)/loop"] == 500
    assert found.loops_of_unknown_length == 0


def test_what_carries_no_estimate_is_listed_with_its_bytes(module) -> None:
    # Both fusions here, as they only start and end an exchange; collectives have a list of theirs.
    fusions = 32 * 128 * 2 + 4 + 32 * 128 * 2
    assert hlo_costs.cycles(module).uncounted == Counter(
        {"fusion": fusions, "sort": 800, "custom-call": 100}
    )


# The TPU compiler leaves the length of a loop out; JAX's loops compare a counter with a constant.
WITHOUT_LENGTH = PROGRAM.replace('"known_trip_count":{"n":"5"},', "").replace(
    "compare(%i.1, %i.1)", "compare(%i.1, %bound)"
)


@pytest.mark.parametrize(
    ("bound", "runs", "unknown"),
    [("constant(6)", 6, 0), ("get-tuple-element(%s.1), index=1", 1, 1)],
)
def test_the_length_of_a_loop_is_read_from_its_condition(bound, runs, unknown) -> None:
    text = WITHOUT_LENGTH.replace(
        "  ROOT %less", f"  %bound = s32[]{{:T(128)}} {bound}\n  ROOT %less"
    )
    found = hlo_costs.cycles(hlo_costs.parse(text))
    # Where nobody knows, it counts once and is told.
    assert found.total == 1000 + 4000 + runs * (100 + 3) + 50 + 7
    assert found.loops_of_unknown_length == unknown


def test_every_exchange_counts_once_by_its_result(module) -> None:
    found = [
        (collective.kind, collective.times, collective.bytes)
        for collective in hlo_costs.collectives(module)
    ]
    assert sorted(found) == [
        ("all-gather", 1, 4 * 3 * 4),  # of start and done, the done
        ("all-gather", 1, 32 * 128 * 2),  # one chain, however many computations carry it
        ("all-reduce", 1, 10 * 4 + 6 * 2),
        ("all-reduce", 5, 5 * 16 * 4),
    ]
    woven = [c for c in hlo_costs.collectives(module) if "shard_map" in c.op_name]
    assert [collective.bytes for collective in woven] == [32 * 128 * 2]


def test_types_of_convolutions_tell_a_silent_widening(module) -> None:
    assert hlo_costs.convolution_types(module, "conv_general_dilated") == {
        ("bf16", "bf16", 2): 1,
        ("f32", "f32", 2): 1,
    }


def test_text_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo_costs.parse("module @jit_step { }")


def test_a_program_compiled_here_is_read() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, y: jnp.sin(y @ y), x)

    compiled = jax.jit(step).lower(jnp.ones((8, 8))).compile()
    module = hlo_costs.parse(compiled.as_text())
    opcodes = {line.opcode for lines in module.computations.values() for line in lines}
    assert "while" in opcodes
    assert hlo_costs.collectives(module) == []


def test_flops_of_products_and_convolutions_by_hand() -> None:
    def f(x, w, k):
        y = jax.lax.conv(x, k, (2, 2), "SAME")  # 4 x 4 pixels of 5 channels from 3 x 3 x 2
        z, _ = jax.lax.scan(lambda c, _: (c @ w, None), jnp.ones((2, 7)), None, length=3)
        return y.sum() + z.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2, 8, 8), (7, 7), (5, 2, 3, 3))]
    forward = 2 * (4 * 4 * 5) * (3 * 3 * 2)
    product = 2 * 2 * 7 * 7
    assert matrix_flops(f, *shapes) == forward + 3 * product
    # Back: to the kernel only as much as forward, and to the input of the product once more.
    gradient = matrix_flops(jax.grad(f, argnums=2), *shapes)
    assert forward <= gradient - forward - 3 * product <= 1.5 * forward


def test_flops_of_a_convolution_are_those_of_one_platform() -> None:
    x, kernel = jnp.ones((1, 4, 6, 6, 3)), jnp.ones((1, 3, 3, 3, 5))

    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.square(convolve(x, kernel, (1, 1, 1))).sum()

    forward = 2 * (4 * 6 * 6 * 5) * (3 * 3 * 3)
    assert matrix_flops(f, x, kernel) == forward
    assert matrix_flops(jax.grad(f, argnums=(0, 1)), x, kernel) == 3 * forward


def test_peaks_units_and_clocks_agree() -> None:
    assert CHIPS["v5e"].clock_hz == pytest.approx(1.5e9, rel=0.01)
    for name in ("v5p", "v6e"):
        assert CHIPS[name].clock_hz == pytest.approx(1.75e9, rel=0.01)
    assert chip_of("v5p:2x2x4") == (CHIPS["v5p"], (2, 2, 4))
    for wrong in ("v5e", "v9:4x4", "v5e:4xx", "v5e:0x4"):
        with pytest.raises(ValueError, match="such as v5e:4x4"):
            chip_of(wrong)


def test_time_of_exchanges_on_rings_and_lines() -> None:
    chip = CHIPS["v5e"]
    # 16 x 16 has two rings of two directions: 200 GB/s; 4 x 4 has two lines: 100 GB/s.
    assert exchange_seconds("all-gather", 256 * 10**6, chip, (16, 16)) == pytest.approx(
        255e6 / 200e9
    )
    assert exchange_seconds("all-reduce", 16 * 10**6, chip, (4, 4)) == pytest.approx(
        2 * 15e6 / 1e11
    )
    # 8 of 16 chips send half of their 16 MB over 4 links.
    assert exchange_seconds("all-to-all", 16 * 10**6, chip, (4, 4)) == pytest.approx(
        8 * 8e6 / (4 * 50e9)
    )
    assert exchange_seconds("all-reduce", 10**6, chip, (1, 1)) == 0
    with pytest.raises(ValueError, match="no model of the time of 'send'"):
        exchange_seconds("send", 1, chip, (4, 4))


# As the GPU compiler writes it: cuDNN's convolutions, one of them with channels first, a fused
# product, a fused transpose, and an exchange behind a convolution.
GPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_product (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %dot = bf16[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_transpose (c: f32[8,4]) -> f32[4,8] {
  %c = f32[8,4]{1,0} parameter(0)
  ROOT %transpose = f32[4,8]{1,0} transpose(%c), dimensions={1,0}
}

%fused_sum (d: f32[8,4]) -> f32[8,4] {
  %d = f32[8,4]{1,0} parameter(0)
  ROOT %add = f32[8,4]{1,0} add(%d, %d)
}

ENTRY %main (x: bf16[2,6,6,8], k: bf16[16,3,3,8], p: bf16[8,16], q: bf16[16,4], f: f32[8,4]) \
-> f32[4,8] {
  %x = bf16[2,6,6,8]{3,2,1,0} parameter(0)
  %k = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %p = bf16[8,16]{1,0} parameter(2)
  %q = bf16[16,4]{1,0} parameter(3)
  %f = f32[8,4]{1,0} parameter(4)
  %start = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%f), to_apply=%fused_sum
  %forward = (bf16[2,3,3,16]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %k), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[2,3,3,16]{3,2,1,0} get-tuple-element(%forward), index=0
  %kernels = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %done = f32[8,4]{1,0} all-reduce-done(%start)
  %inputs = (bf16[2,6,6,8]{3,2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=3x3}, \
dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convBackwardInput"
  %product = bf16[8,4]{1,0} fusion(%p, %q), kind=kCustom, calls=%fused_product
  %sum = f32[8,4]{1,0} fusion(%done), kind=kLoop, calls=%fused_sum
  ROOT %out = f32[4,8]{1,0} fusion(%sum), kind=kInput, calls=%fused_transpose
}
"""


def test_costs_of_a_program_for_gpus() -> None:
    gpu = dataclasses.replace(GPUS["h100"], peak_flops=1e9, bandwidth=1e6, link_bandwidth=64_000.0)
    found = costs(hlo_costs.parse(GPU_PROGRAM), gpu, 2)
    # In bytes. The 4,096 of working memory are neither an argument nor a result.
    x, kernel, y = 2 * 576, 2 * 1152, 2 * 288
    convolution, product, small = x + kernel + y, 2 * (128 + 64 + 32), 2 * 128
    assert found.bytes == 3 * convolution + product + 2 * small
    assert found.relayout_bytes == small
    # 18 pixels of 16 features of 9 taps of 8 channels; with channels first, 3 features a pixel.
    flops = 2 * 18 * 16 * 9 * 8
    first = 2 * 1152 * 288 // 3
    assert found.convolution_flops == 2 * flops + first
    assert found.channels_last_flops == 2 * flops
    bounds = [flops / 1e9, first / 1e9, 2 * 8 * 16 * 4 / 1e9]
    assert max(bounds) < convolution / 1e6  # all are bound by memory
    assert found.seconds == pytest.approx(found.bytes / 1e6)
    assert found.seconds_by_kind == {
        "memory of convolutions and products": pytest.approx((3 * convolution + product) / 1e6),
        "other memory": pytest.approx(small / 1e6),
        "layout": pytest.approx(small / 1e6),
    }
    # 128 bytes, once there and once back, half of them each; two convolutions take longer.
    assert found.exchange_seconds == pytest.approx(2 * 128 / 2 / 64_000)
    assert found.overlapped_seconds == pytest.approx(found.exchange_seconds)
    slow = costs(hlo_costs.parse(GPU_PROGRAM), dataclasses.replace(gpu, link_bandwidth=1e4), 2)
    assert slow.exchange_seconds == pytest.approx(0.0128)
    assert slow.overlapped_seconds == pytest.approx(2 * convolution / 1e6)


def test_matrix_units_bound_what_they_must() -> None:
    gpu = dataclasses.replace(GPUS["h100"], peak_flops=1e6, bandwidth=1e9)
    found = costs(hlo_costs.parse(GPU_PROGRAM), gpu, 1)
    flops = found.convolution_flops + 2 * 8 * 16 * 4
    assert found.seconds_by_kind["matrix units"] == pytest.approx(flops / 1e6)
    assert found.exchange_seconds == 0


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h100:x", "v5e:4x4", "b7:8"])
def test_a_topology_of_gpus_names_a_gpu_and_a_number(topology: str) -> None:
    with pytest.raises(UserError, match=rf"topology '{topology}' is not GPU:NUMBER"):
        gpu_of(topology)
    assert gpu_of("a100:8")[1] == 8
