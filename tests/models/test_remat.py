"""Rematerialisation: the same function, parameters and gradients, and less kept for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.models import encoders, layers
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.models.video_resnet import VideoResNet
from tests.models import test_named_encoders as named

SMALL = named.SMALL | {
    "r2plus1d": VideoResNet((4, 6), (1, 1), "r2plus1d", "r2plus1d", subtract_time_mean=False),
    "audio resnet": AudioResNet((4, 6), (1, 1), "resnet"),
}
# Compiled twice each, so that only one of each kind of code is always run.
QUICK = ("r2plus1d", "convnet", "factorised")


def arguments(name):
    encoder = SMALL[name]
    audio = isinstance(encoder, AudioResNet)
    x = jax.random.normal(jax.random.key(1), (3, 16, 16)) if audio else named.small_input(encoder)
    shapes = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return x, jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 0.6, leaf.shape), leaf.dtype), shapes
    )


def loss(encoder, variables, x, params):
    mask = jnp.arange(x.shape[0]) != 1
    outputs, statistics = encoder.apply(
        variables | {"params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
    )
    # No symmetric sum: normalisation would take its gradient away.
    return jnp.sin(3 * outputs["features"]).sum(), statistics


def kept_bytes(encoder, x, variables):
    """Bytes of the activations that the backward pass finds in memory."""
    residuals = jax.eval_shape(
        lambda params: jax.vjp(
            functools.partial(loss, encoder, variables, x), params, has_aux=True
        )[1],
        variables["params"],
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(residuals)
        if leaf.shape not in shapes
    )


def test_all_classes_of_encoders_are_covered():
    assert {type(encoder).__name__ for encoder in SMALL.values()} == set(encoders.CLASSES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "s3dg" else n for n in SMALL]
)
def test_blocks_keep_the_names_of_parameters_and_little_else(name):
    x, variables = arguments(name)
    kept = {"none": kept_bytes(SMALL[name], x, variables)}
    for remat in ("norms", "blocks"):
        again = SMALL[name].clone(remat=remat)
        shapes = jax.eval_shape(functools.partial(again.init, train=False), jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
        kept[remat] = kept_bytes(again, x, variables)
    convolves = "transformer" not in type(SMALL[name]).__name__.lower()
    assert kept["blocks"] < 0.7 * kept["none"]
    assert kept["norms"] < 0.8 * kept["none"]
    assert (kept["norms"] > kept["blocks"]) == convolves


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL]
)
def test_gradients_and_statistics_are_the_same(name):
    x, variables = arguments(name)

    @functools.partial(jax.jit, compiler_options=named.QUICK)
    def gradients(params):
        return [
            jax.value_and_grad(functools.partial(loss, encoder, variables, x), has_aux=True)(params)
            for encoder in (SMALL[name].clone(remat=r) for r in ("none", "norms", "blocks"))
        ]

    ((value, statistics), expected), *others = gradients(variables["params"])
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-2
    for (same, new), found in others:
        np.testing.assert_allclose(same, value, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), new, statistics)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6 * largest),
            found,
            expected,
        )


def test_the_gradient_of_the_largest_value_never_divides_by_how_many_there_are():
    x = jnp.zeros((2, 3, 4, 5)).at[0, 1, 2].set(1.0)
    gradient = jax.grad(lambda x: layers.encoded(x, "max")["features"].sum())(x)
    assert sorted(set(np.unique(gradient).tolist())) == [0.0, 1.0]
    np.testing.assert_array_equal(gradient.sum(axis=(1, 2)), np.ones((2, 5)))
    np.testing.assert_array_equal(gradient[0, 1, 2], np.ones(5))
    np.testing.assert_array_equal(layers.encoded(x, "max")["features"], x.max(axis=(1, 2)))


def test_an_unknown_kind_is_one_clear_error():
    for name in ("convnet", "joint"):
        x, variables = arguments(name)
        with pytest.raises(
            ValueError, match="unknown remat 'all': use 'none', 'norms' or 'blocks'"
        ):
            SMALL[name].clone(remat="all").apply(variables, x, train=False)
