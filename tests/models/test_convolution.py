"""Convolution: all lowerings are one function with one gradient, chosen by the platform."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from avcl_jax.models.convolution import convolve, convolve_packed
from avcl_jax.models.layers import Conv

# Shape of the input, of the kernel, strides: those of the encoders in small.
CASES = {
    "spatial": ((2, 4, 8, 9, 5), (1, 3, 3, 5, 7), (1, 1, 1)),
    "spatial_fewer_features": ((2, 4, 8, 9, 7), (1, 3, 3, 7, 5), (1, 1, 1)),
    "spatial_strided": ((2, 4, 8, 9, 5), (1, 3, 3, 5, 7), (1, 2, 2)),
    "temporal": ((2, 6, 5, 6, 5), (3, 1, 1, 5, 7), (1, 1, 1)),
    "temporal_fewer_features": ((2, 6, 5, 6, 7), (3, 1, 1, 7, 5), (1, 1, 1)),
    "temporal_strided": ((2, 7, 5, 6, 7), (3, 1, 1, 7, 3), (2, 1, 1)),
    "shortcut": ((2, 7, 5, 6, 7), (1, 1, 1, 7, 3), (2, 2, 2)),
    "stem": ((1, 2, 14, 15, 3), (1, 7, 7, 3, 6), (1, 2, 2)),
    "stem_whole": ((1, 4, 14, 15, 3), (3, 7, 7, 3, 6), (1, 2, 2)),
    "whole": ((2, 4, 6, 7, 5), (3, 3, 3, 5, 6), (2, 2, 2)),
    "whole_fewer_features": ((2, 4, 6, 7, 6), (3, 3, 3, 6, 5), (1, 1, 1)),
    "picture": ((2, 8, 9, 5), (3, 3, 5, 6), (2, 1)),
    "picture_of_one_channel": ((2, 8, 9, 1), (3, 3, 1, 6), (2, 2)),
    "many_pixels": ((1, 8, 64, 64, 6), (1, 3, 3, 6, 6), (1, 1, 1)),  # sums in parts
}

# Further, pixels side by side as channels in the input and in the output.
PACKED = {
    "spatial": ((2, 4, 8, 8, 5), (1, 3, 3, 5, 7), (1, 1, 1), (2, 2)),
    "spatial_of_four": ((2, 4, 5, 8, 5), (1, 3, 3, 5, 7), (1, 1, 1), (4, 4)),
    "temporal": ((2, 6, 5, 6, 5), (3, 1, 1, 5, 7), (1, 1, 1), (2, 2)),
    "stem": ((1, 2, 14, 16, 3), (1, 7, 7, 3, 6), (1, 2, 2), (1, 2)),
    "stem_of_odd_width": ((1, 2, 14, 15, 3), (1, 7, 7, 3, 6), (1, 2, 2), (1, 4)),
    "last": ((2, 4, 8, 8, 5), (1, 3, 3, 5, 7), (1, 2, 2), (2, 1)),
    "last_of_odd_width": ((2, 4, 8, 6, 5), (1, 3, 3, 5, 7), (1, 2, 2), (2, 1)),
    "strided": ((2, 4, 8, 8, 5), (1, 3, 3, 5, 7), (1, 2, 2), (2, 2)),
    "four_to_two": ((2, 4, 8, 8, 5), (1, 3, 3, 5, 7), (1, 2, 2), (4, 2)),
    "shortcut": ((2, 7, 6, 8, 7), (1, 1, 1, 7, 3), (2, 2, 2), (4, 2)),
    "whole": ((2, 4, 6, 8, 5), (3, 3, 3, 5, 6), (2, 2, 2), (2, 1)),
    "picture": ((2, 9, 8, 5), (3, 3, 5, 6), (2, 1), (2, 2)),
}


def arrays(case):
    x, kernel, strides = CASES[case]
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel), strides


@pytest.mark.parametrize(
    ("case", "lowering"),
    [*itertools.product(CASES, ("folded", "products")), ("spatial", "auto")],
)
def test_values_and_gradients_are_those_of_one_convolution(case, lowering):
    x, kernel, strides = arrays(case)

    def run(lowering):
        def loss(x, kernel):
            # Not linear, so that every output pixel has a gradient of its own.
            return jnp.sin(convolve(x, kernel, strides, lowering)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)

    value, gradients = run(lowering)
    expected_value, expected = run("direct")
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    for got, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def packed(x, pack):
    return x.reshape(*x.shape[:-2], x.shape[-2] // pack, pack * x.shape[-1])


@pytest.mark.parametrize("case", PACKED)
def test_packed_pixels_have_the_values_and_gradients_of_single_ones(case):
    x_shape, kernel_shape, strides, packs = PACKED[case]
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], kernel_shape)

    def run(convolve):
        def loss(x, kernel):
            out = convolve(x, kernel)
            return jnp.sin(out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)
        return out, *gradients

    def by_packs(x, kernel):
        return convolve_packed(packed(x, packs[0]), kernel, strides, packs)

    expected = run(lambda x, kernel: packed(convolve(x, kernel, strides, "direct"), packs[1]))
    for got, wanted in zip(run(by_packs), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("columns", "stride", "packs"), [(9, 1, (1, 2)), (8, 1, (4, 2)), (8, 2, (2, 3))]
)
def test_packs_that_do_not_fit_are_refused(columns, stride, packs):
    x, kernel = jnp.zeros((1, 4, columns // packs[0], 3 * packs[0])), jnp.zeros((3, 3, 3, 2))
    with pytest.raises(ValueError, match="cannot be packed"):
        convolve_packed(x, kernel, (1, stride), packs)


def test_it_is_the_correlation_of_scipy():
    x, kernel, strides = arrays("whole")
    out = convolve(x, kernel, strides)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    for clip in range(2):
        for feature in range(6):
            full = scipy.signal.correlate(padded[clip], kernel[..., feature], mode="valid")
            np.testing.assert_allclose(out[clip, ..., feature], full[::2, ::2, ::2, 0], atol=1e-4)


def test_half_precision_sums_in_single():
    x, kernel, strides = arrays("many_pixels")
    x16, kernel16 = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def gradient(x, kernel):
        return jax.grad(lambda kernel: convolve(x, kernel, strides, "products").sum())(kernel)

    exact = gradient(x16.astype(jnp.float32), kernel16.astype(jnp.float32))
    got = gradient(x16, kernel16)
    assert got.dtype == jnp.bfloat16
    # One rounding of the result: a sum of 32,768 terms in bfloat16 would be off by far more.
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8, atol=0.05)


@pytest.mark.parametrize(("platform", "dimensions"), [("cpu", 2), ("tpu", 3), ("cuda", 2)])
def test_the_platform_that_it_is_compiled_for_chooses(platform, dimensions):
    x, kernel, strides = arrays("spatial")

    def step(x, kernel):
        def loss(x, kernel):
            return convolve(x, kernel, strides).sum()

        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    text = jax.jit(step).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    found = {
        line.split("dim_numbers = [")[1].split("]")[0].count(",") - 1
        for line in text.splitlines()
        if "stablehlo.convolution" in line
    }
    assert found == {dimensions}
    assert ("stablehlo.dot_general" in text) == (platform == "cpu")


def test_nothing_is_left_to_choose_when_it_runs():
    x, kernel, strides = arrays("spatial")
    gradient = jax.grad(lambda kernel: convolve(x, kernel, strides).sum())
    assert "conditional" not in jax.jit(gradient).lower(kernel).compile().as_text()


def test_the_layer_passes_its_lowering_on():
    x, _, strides = arrays("spatial")
    layer = Conv(7, (1, 3, 3), strides, "direct")
    variables = layer.init(jax.random.key(1), x)
    text = jax.jit(layer.apply).lower(variables, x).as_text()
    assert "b, 0, 1, 2, f" in text
