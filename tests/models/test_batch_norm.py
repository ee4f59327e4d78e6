"""Batch normalisation against numpy: in bfloat16, over devices, frozen, and as published."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.models import encoders
from avcl_jax.models.layers import BatchNorm
from tests.models import sharded_norm
from tests.models.test_named_encoders import PUBLISHED, make


def test_statistics_of_bfloat16_are_computed_in_float32():
    """Values around 100, of which bfloat16 tells apart two a unit: their sum needs more digits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(100.0, 4.0, (64, 33, 3)), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, train=False, mask=None)
    out, mutated = norm.apply(variables, x, train=True, mask=None, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, mutated))} == {jnp.dtype("float32")}
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    found = mutated["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], 0.1 * exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * exact.var(0), rtol=1e-3)
    # Rounded after the division, not before the subtraction.
    expected = (np.asarray(x, np.float64) - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-7, atol=2e-3)


def test_sharded_batches_are_normalised_by_the_whole(run_with_cpu_devices, tmp_path):
    path = tmp_path / "norm.npz"
    run_with_cpu_devices(8, sharded_norm.__name__, str(path))
    found = np.load(path)
    x, mask = sharded_norm.batch()
    rows = x[mask].astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(found["mean"], 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * rows.var(0), rtol=1e-4)
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(found["out"][mask], expected[mask], atol=1e-4)


def test_frozen_statistics_stay_and_scale_and_shift_learn():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3.0, 2.0, (8, 4, 3)), jnp.float32)
    weight = rng.normal(size=x.shape).astype(np.float32)
    mean, var = np.float32([1.0, 2.0, 3.0]), np.float32([4.0, 5.0, 6.0])
    statistics = {"norm": {"mean": mean, "var": var}}
    params = {"norm": {"scale": jnp.full(3, 1.5), "bias": jnp.full(3, 0.5)}}

    def loss(params):
        variables = {"params": params, "batch_stats": statistics}
        out, mutated = BatchNorm(frozen=True).apply(
            variables, x, train=True, mask=jnp.arange(8) != 2, mutable=["batch_stats"]
        )
        return (out * weight).sum(), mutated

    gradient, mutated = jax.grad(loss, has_aux=True)(params)
    normalised = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)
    by_scale = (weight * normalised).sum((0, 1))
    np.testing.assert_allclose(gradient["norm"]["scale"], by_scale, rtol=1e-4)
    np.testing.assert_allclose(gradient["norm"]["bias"], weight.sum((0, 1)), rtol=1e-4)
    assert np.abs(by_scale).min() > 0.1
    kept = mutated.get("batch_stats", statistics)
    jax.tree.map(np.testing.assert_array_equal, kept, statistics)


@pytest.mark.parametrize("train", [True, False])
def test_packed_pixels_are_normalised_as_single_ones(train):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3.0, 2.0, (4, 5, 6, 3)), jnp.float32)
    weight = rng.normal(size=x.shape).astype(np.float32)
    statistics = {"norm": {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 5, 6])}}
    params = {"norm": {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, 2])}}
    mask = jnp.array([True, False, True, True])

    def run(pack):
        def loss(params, x):
            out, mutated = BatchNorm(pack=pack).apply(
                {"params": params, "batch_stats": statistics},
                x.reshape(4, 5, 6 // pack, 3 * pack),
                train=train,
                mask=mask,
                mutable=["batch_stats"],
            )
            out = out.reshape(x.shape)
            return (out * weight).sum(), (out, mutated)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    jax.tree.map(lambda *a: np.testing.assert_allclose(*a, atol=1e-4, rtol=1e-5), run(2), run(1))


@pytest.mark.parametrize(("modality", "name"), PUBLISHED)
def test_constants_of_every_family_are_those_published(modality, name):
    """As docs/encoders.md has them; transformers have no batch normalisation."""
    encoder = make(modality, name)
    if "norm_momentum" not in type(encoder).__dataclass_fields__:
        assert name.startswith(("vivit", "ast"))
        return
    published = (0.999, 1e-3) if name.startswith("s3d") else (0.9, 1e-5)
    assert (encoder.norm_momentum, encoder.norm_epsilon) == published
    fixed = encoders.BY_MODALITY[modality][name].fixed
    assert {"norm_momentum", "norm_epsilon"} <= fixed.keys()
