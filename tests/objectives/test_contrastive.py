"""The contrastive objective against its equation, the oracle, and its own symmetries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from avcl_jax.objectives import contrastive
from avcl_jax.objectives.views import per_view

# Compiled as one: op by op, each of the fifty operations would be compiled on its own.
contrastive_loss = jax.jit(contrastive.contrastive_loss, static_argnames="kind")


@partial(jax.jit, static_argnames="kind")
def per_anchor_loss(*, anchor_mask, target_mask, **inputs):
    """Loss of every anchor alone, and the mask of those that count."""
    mask = per_view(anchor_mask)
    inputs["target_mask"] = per_view(target_mask)
    alone = jnp.eye(mask.size, dtype=bool).reshape(-1, *mask.shape) & mask[None]
    loss, metrics = jax.vmap(lambda one: contrastive.contrastive_loss(anchor_mask=one, **inputs))(
        alone
    )
    return loss.reshape(mask.shape), metrics["anchors"].reshape(mask.shape) == 1


ORACLE = Path(__file__).parent / "testdata" / "contrastive_oracle.npz"
TERMS = {
    "vv": ("video", "video", "within"),
    "va": ("video", "audio", "cross"),
    "av": ("audio", "video", "cross"),
}


def anchors_of(inputs, kind):
    """Every anchor that counts: its index, its partner's, and those of its negatives in the batch.

    Yields the same for the rows of the bank: valid positives and negatives [rows, dim].
    """
    masks = [inputs[f"{name}_mask"] for name in ("anchor", "target")]
    anchor, target = (np.stack([m, m], axis=1) if m.ndim == 1 else m for m in masks)
    source = inputs["source_id"]
    for i, k in np.ndindex(anchor.shape):
        partner = (i, 1 - k) if kind == "within" else (i, k)
        if not (anchor[i, k] and target[partner]):
            continue
        negatives = [n for n in np.ndindex(target.shape) if target[n] and source[n[0]] != source[i]]
        rows = [
            inputs[f"bank_{name}s"][i, k][inputs[f"bank_{name}_mask"][i, k]]
            if f"bank_{name}s" in inputs
            else np.zeros((0, inputs["anchors"].shape[-1]))
            for name in ("positive", "negative")
        ]
        yield (i, k), partner, negatives, *rows


def expected_losses(inputs, kind):
    """l(z) of every anchor, by loops over the module's equation; NaN if it does not count."""
    losses = np.full(inputs["anchors"].shape[:2], np.nan)
    targets, temperature = inputs["targets"], inputs["temperature"]
    for anchor, partner, batch, bank, rows in anchors_of(inputs, kind):
        z = inputs["anchors"][anchor]
        share = inputs["positive_weight"] if len(bank) else 0.0
        positives = [(1 - share, targets[partner]), *((share / len(bank), p) for p in bank)]
        negatives = [*(targets[n] for n in batch), *rows]
        denominator = sum(np.exp(z @ n / temperature) for n in negatives)
        losses[anchor] = 0
        for weight, p in positives:
            numerator = np.exp(z @ p / temperature)
            losses[anchor] -= weight * np.log(numerator / (numerator + denominator))
    return losses


def expected_gradient_of_targets(inputs, kind):
    """Balanced gradient of the mean loss: the partner's is minus that of the batch's negatives."""
    targets, temperature = inputs["targets"], inputs["temperature"]
    gradient, counted = np.zeros_like(targets), list(anchors_of(inputs, kind))
    for anchor, partner, batch, bank, rows in counted:
        z = inputs["anchors"][anchor]
        of_batch = np.exp([z @ targets[n] / temperature for n in batch])
        negatives = of_batch.sum() + np.exp(rows @ z / temperature).sum()
        positive = np.exp(z @ targets[partner] / temperature)
        share = inputs["positive_weight"] if len(bank) else 0.0
        scale = (1 - share) / (negatives + positive) / temperature / len(counted)
        for e, n in zip(of_batch, batch, strict=True):
            gradient[n] += scale * e * z
            gradient[partner] -= scale * e * z
    return gradient


def unit(rng, *shape):
    values = rng.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def example(
    seed=0,
    videos=5,
    dim=4,
    positives=3,
    negatives=4,
    kind="cross",
    missing=0.3,
    temperature=0.1,
    views=(),
):
    """Random float64 inputs: sources repeat, modalities are missing, bank rows are masked."""
    rng = np.random.default_rng(seed)
    anchors = unit(rng, videos, 2, dim)
    anchor_mask = rng.random((videos, *views)) >= missing
    inputs = {
        "anchors": anchors,
        "targets": anchors if kind == "within" else unit(rng, videos, 2, dim),
        "source_id": rng.integers(0, videos, videos),
        "anchor_mask": anchor_mask,
        "target_mask": anchor_mask if kind == "within" else rng.random((videos, *views)) >= missing,
        "bank_positives": unit(rng, videos, 2, positives, dim),
        "bank_positive_mask": rng.random((videos, 2, positives)) >= missing,
        "bank_negatives": unit(rng, videos, 2, negatives, dim),
        "bank_negative_mask": rng.random((videos, 2, negatives)) >= missing,
        "temperature": temperature,
        "positive_weight": 0.4,
    }
    return inputs, kind


def gradient_of(inputs, *names, kind):
    """Loss and its gradient with respect to the named inputs."""

    @jax.jit
    def loss_and_gradient(variables):
        return jax.value_and_grad(
            lambda variables: contrastive_loss(**(inputs | variables), kind=kind)[0]
        )(variables)

    return loss_and_gradient({name: inputs[name] for name in names})


def on_device(inputs):
    return {
        name: value if np.ndim(value) == 0 else jnp.asarray(value) for name, value in inputs.items()
    }


def without_bank(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("bank_")}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("bank", [False, True])
def test_oracle(term, bank):
    stored = np.load(ORACLE)
    anchor, target, kind = TERMS[term]
    inputs = {
        "anchors": stored[anchor],
        "targets": stored[target],
        "source_id": stored["source_id"],
        "anchor_mask": stored[f"has_{anchor}"],
        "target_mask": stored[f"has_{target}"],
        "temperature": float(stored["temperature"]),
        "positive_weight": float(stored["positive_weight"]),
    }
    for short, name in (("pos", "positive"), ("neg", "negative")) if bank else ():
        inputs[f"bank_{name}s"] = stored[f"{term}_bank_{short}"]
        inputs[f"bank_{name}_mask"] = stored[f"{term}_bank_{short}_mask"]
    inputs = on_device(inputs)
    expected = stored[f"{term}_loss_{'with' if bank else 'without'}_bank"]
    losses, counted = per_anchor_loss(**inputs, kind=kind)
    np.testing.assert_array_equal(counted, ~np.isnan(expected))
    np.testing.assert_allclose(np.where(counted, losses, np.nan), expected, atol=3e-6)
    loss, _ = contrastive_loss(**inputs, kind=kind)
    np.testing.assert_allclose(loss, np.nanmean(expected), atol=3e-6)


@hypothesis_settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["within", "cross"]),
    rows=st.sampled_from([(0, 0), (3, 0), (0, 4), (3, 4)]),
    missing=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    positive_weight=st.sampled_from([0.0, 0.4, 1.0]),
    views=st.sampled_from([(), (2,)]),
)
def test_equation(seed, kind, rows, missing, temperature, positive_weight, views):
    inputs, kind = example(
        seed,
        kind=kind,
        positives=rows[0],
        negatives=rows[1],
        missing=missing,
        temperature=temperature,
        views=views,
    )
    inputs["positive_weight"] = positive_weight
    expected = expected_losses(inputs, kind)
    with jax.enable_x64(True):
        losses, counted = per_anchor_loss(**on_device(inputs), kind=kind)
    np.testing.assert_array_equal(counted, ~np.isnan(expected))
    np.testing.assert_allclose(np.where(counted, losses, np.nan), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["within", "cross"])
@pytest.mark.parametrize("arrangement", ["one point", "opposite", "partners opposite"])
def test_extreme_similarities_in_float32(kind, arrangement):
    """At τ = 0.005 e^{z·p/τ} overflows float32; the loss and its gradient must not."""
    point = np.array([1.0, 0, 0, 0])
    anchors = np.broadcast_to(point, (4, 2, 4)).copy()
    if arrangement == "opposite":
        anchors[::2] = -point
    if arrangement == "partners opposite":
        anchors[:, 1] = -point
    inputs, _ = example(videos=4, missing=0.0, temperature=0.005)
    inputs |= {"anchors": anchors, "targets": anchors, "source_id": np.arange(4)}
    precise = {
        name: value.astype(np.longdouble) if np.ndim(value) and value.dtype == float else value
        for name, value in inputs.items()
    }
    expected = expected_losses(precise, kind)
    inputs = on_device(inputs)
    losses, _ = per_anchor_loss(**inputs, kind=kind)
    np.testing.assert_allclose(losses, expected.astype(float), rtol=1e-5, atol=1e-3)
    _, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())


@pytest.mark.parametrize("kind", ["within", "cross"])
@pytest.mark.parametrize("rows", [(0, 0), (3, 0), (0, 4), (3, 4)])
def test_gradients_of_targets_are_balanced_and_those_of_anchors_are_of_the_loss(kind, rows):
    """The derivative along a shift of all targets is 0, and rows of the bank get no gradient."""
    inputs, _ = example(3, kind=kind, positives=rows[0], negatives=rows[1], views=(2,))
    by_target = expected_gradient_of_targets(inputs, kind)
    direction = np.random.default_rng(0).normal(size=inputs["anchors"].shape)
    names = ("anchors", "targets", "bank_positives", "bank_negatives")
    with jax.enable_x64(True):
        device = on_device(inputs)
        gradient = jax.device_get(gradient_of(device, *names, kind=kind)[1])
        forth, back = (
            float(contrastive_loss(**device | {"anchors": inputs["anchors"] + step}, kind=kind)[0])
            for step in (1e-6 * direction, -1e-6 * direction)
        )
    slope = (gradient["anchors"] * direction).sum()
    np.testing.assert_allclose(slope, (forth - back) / 2e-6, rtol=1e-6)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(gradient["targets"], by_target, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient["targets"].sum((0, 1)), 0, atol=1e-14)
    assert np.abs(by_target).max() > 1e-2
    assert not gradient["bank_positives"].any()
    assert not gradient["bank_negatives"].any()


@pytest.mark.parametrize("kind", ["within", "cross"])
@pytest.mark.parametrize("lacking", ["anchors", "negatives"])
def test_without_anchors_or_negatives_loss_and_gradient_are_zero(kind, lacking):
    inputs, _ = example(missing=1.0 if lacking == "anchors" else 0.0)
    if lacking == "negatives":
        inputs = without_bank(inputs | {"source_id": np.full(5, 7)})
    inputs = on_device(inputs)
    loss, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    assert loss == 0
    assert not any(leaf.any() for leaf in gradient.values())
    _, metrics = contrastive_loss(**inputs, kind=kind)
    assert metrics["anchors"] == (0 if lacking == "anchors" else 10)
    assert metrics["accuracy"] == metrics["negative_similarity"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", ["within", "cross"])
def test_whatever_a_missing_entry_holds(kind):
    inputs, _ = example(seed=1, kind=kind)
    clean, _ = contrastive_loss(**on_device(inputs), kind=kind)
    for name, mask in (
        ("anchors", "anchor_mask"),
        ("targets", "target_mask"),
        ("bank_positives", "bank_positive_mask"),
        ("bank_negatives", "bank_negative_mask"),
    ):
        inputs[name] = inputs[name].copy()
        inputs[name][~inputs[mask]] = np.nan
        assert np.isnan(inputs[name]).any()
    inputs = on_device(inputs)
    loss, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    np.testing.assert_allclose(loss, clean, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_half_precision_embeddings_give_a_float32_loss():
    inputs, kind = example(missing=0.0)
    halves = on_device(inputs)
    for name, value in halves.items():
        if np.ndim(value) and value.dtype == jnp.float32:
            halves[name] = value.astype(jnp.bfloat16)
    wide = {
        name: value.astype(jnp.float32) if np.ndim(value) and value.dtype == jnp.bfloat16 else value
        for name, value in halves.items()
    }
    loss, _ = contrastive_loss(**halves, kind=kind)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, contrastive_loss(**wide, kind=kind)[0], rtol=1e-6)


def test_metrics():
    inputs, kind = example(videos=12, missing=0.2)
    _, metrics = contrastive_loss(**on_device(inputs), kind=kind)
    found = {name: [] for name in ("positive", "negative", "bank_positive", "bank_negative")}
    first = []
    for anchor, partner, batch, *rows in anchors_of(inputs, kind):
        others = [inputs["targets"][n] for n in batch]
        vectors = ([inputs["targets"][partner]], others, *rows)
        for name, values in zip(found, vectors, strict=True):
            found[name] += [value @ inputs["anchors"][anchor] for value in values]
        if batch:
            first.append(found["positive"][-1] > max(found["negative"][-len(batch) :]))
    for name, values in found.items():
        # Means of cosines that cancel are known to the rounding of the cosines.
        similarity = metrics[f"{name}_similarity"]
        np.testing.assert_allclose(similarity, np.mean(values), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(first), rtol=1e-6)
    assert metrics["anchors"] == len(found["positive"])
    assert 0 < np.mean(first) < 1


def test_accuracy_shows_a_collapse():
    """Embeddings in one point tie with every negative: that must read as 0, not as 1."""
    inputs, kind = example(missing=0.0)
    point = np.broadcast_to([1.0, 0, 0, 0], inputs["anchors"].shape)
    inputs = on_device(inputs | {"anchors": point, "targets": point})
    _, metrics = contrastive_loss(**inputs, kind=kind)
    assert metrics["accuracy"] == 0
    assert metrics["negative_similarity"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank_positive_mask": None}, "bank_positives and bank_positive_mask: give both"),
        ({"bank_negatives": None}, "bank_negatives and bank_negative_mask: give both"),
        ({"kind": "across"}, "kind"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    inputs, kind = example()
    arguments = on_device(inputs) | {"kind": kind} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        contrastive_loss(**arguments)
