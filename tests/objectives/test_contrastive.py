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


def expected_losses(
    anchors,
    targets,
    *,
    kind,
    source_id,
    anchor_mask,
    target_mask,
    temperature,
    positive_weight,
    bank_positives=None,
    bank_positive_mask=None,
    bank_negatives=None,
    bank_negative_mask=None,
):
    """l(z) of every anchor, by loops over the module's equation; NaN if it does not count."""
    videos = len(anchors)
    losses = np.full((videos, 2), np.nan)
    if anchor_mask.ndim == 1:
        anchor_mask, target_mask = (np.stack([m, m], axis=1) for m in (anchor_mask, target_mask))
    for i in range(videos):
        for k in range(2):
            if not (anchor_mask[i, k] and target_mask[i, 1 - k if kind == "within" else k]):
                continue
            z = anchors[i, k]
            negatives = [
                targets[j, v]
                for j in range(videos)
                for v in range(2)
                if target_mask[j, v] and source_id[j] != source_id[i]
            ]
            if bank_negatives is not None:
                negatives += list(bank_negatives[i, k][bank_negative_mask[i, k]])
            bank = []
            if bank_positives is not None:
                bank = list(bank_positives[i, k][bank_positive_mask[i, k]])
            partner = targets[i, 1 - k] if kind == "within" else targets[i, k]
            share = positive_weight if bank else 0.0
            positives = [(1 - share, partner), *((share / len(bank), p) for p in bank)]
            denominator = sum(np.exp(z @ n / temperature) for n in negatives)
            losses[i, k] = 0
            for weight, p in positives:
                numerator = np.exp(z @ p / temperature)
                losses[i, k] -= weight * np.log(numerator / (numerator + denominator))
    return losses


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
        "bank_positives": stored[f"{term}_bank_pos"],
        "bank_positive_mask": stored[f"{term}_bank_pos_mask"],
        "bank_negatives": stored[f"{term}_bank_neg"],
        "bank_negative_mask": stored[f"{term}_bank_neg_mask"],
    }
    inputs = on_device(inputs if bank else without_bank(inputs))
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
    expected = expected_losses(**inputs, kind=kind)
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
    expected = expected_losses(
        **{
            name: value.astype(np.longdouble) if np.asarray(value).dtype == float else value
            for name, value in inputs.items()
            if np.ndim(value)
        },
        temperature=0.005,
        positive_weight=0.4,
        kind=kind,
    )
    inputs = on_device(inputs)
    losses, _ = per_anchor_loss(**inputs, kind=kind)
    np.testing.assert_allclose(losses, expected.astype(float), rtol=1e-5, atol=1e-3)
    _, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())


def expected_gradients(
    anchors,
    targets,
    *,
    kind,
    source_id,
    anchor_mask,
    target_mask,
    temperature,
    positive_weight,
    bank_positives,
    bank_positive_mask,
    bank_negatives,
    bank_negative_mask,
):
    """Balanced gradients of the mean with respect to anchors and targets, by loops.

    In the partner's term, the partner's gradient is minus the sum of those of the batch's
    negatives; in the terms of bank positives, targets get none.
    """
    by_anchor, by_target = np.zeros_like(anchors), np.zeros_like(targets)
    if anchor_mask.ndim == 1:
        anchor_mask, target_mask = (np.stack([m, m], axis=1) for m in (anchor_mask, target_mask))
    counted = [
        (i, k)
        for i, k in np.ndindex(len(anchors), 2)
        if anchor_mask[i, k] and target_mask[i, 1 - k if kind == "within" else k]
    ]
    for i, k in counted:
        z = anchors[i, k]
        batch = [
            (j, v)
            for j, v in np.ndindex(len(anchors), 2)
            if target_mask[j, v] and source_id[j] != source_id[i]
        ]
        rows = bank_negatives[i, k][bank_negative_mask[i, k]]
        of_batch = np.exp([z @ targets[n] / temperature for n in batch])
        of_rows = np.exp(rows @ z / temperature)
        negatives = of_batch.sum() + of_rows.sum()
        if not negatives:
            continue
        pull = sum((e * targets[n] for e, n in zip(of_batch, batch, strict=True)), of_rows @ rows)
        bank = bank_positives[i, k][bank_positive_mask[i, k]]
        share = positive_weight if len(bank) else 0.0
        partner = (i, 1 - k) if kind == "within" else (i, k)
        for weight, positive in [
            (1 - share, targets[partner]),
            *((share / len(bank), p) for p in bank),
        ]:
            miss = negatives / (negatives + np.exp(z @ positive / temperature))
            scale = weight * miss / temperature / len(counted)
            by_anchor[i, k] += scale * (pull / negatives - positive)
        miss = negatives / (negatives + np.exp(z @ targets[partner] / temperature))
        scale = (1 - share) * miss / temperature / len(counted)
        for e, n in zip(of_batch, batch, strict=True):
            by_target[n] += scale * e / negatives * z
            by_target[partner] -= scale * e / negatives * z
    return by_anchor, by_target


@pytest.mark.parametrize("kind", ["within", "cross"])
@pytest.mark.parametrize("rows", [(0, 0), (3, 0), (0, 4), (3, 4)])
def test_gradients_are_balanced(kind, rows):
    """The derivative along a shift of all targets is 0."""
    inputs, _ = example(3, kind=kind, positives=rows[0], negatives=rows[1], views=(2,))
    by_anchor, by_target = expected_gradients(**inputs, kind=kind)
    with jax.enable_x64(True):
        _, gradient = gradient_of(on_device(inputs), "anchors", "targets", kind=kind)
    gradient = jax.device_get(gradient)
    np.testing.assert_allclose(gradient["anchors"], by_anchor, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient["targets"], by_target, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient["targets"].sum((0, 1)), 0, atol=1e-14)
    assert np.abs(by_target).max() > 1e-2


@pytest.mark.parametrize("kind", ["within", "cross"])
@pytest.mark.parametrize("bank", [False, True])
def test_gradient_of_anchors_against_finite_differences(kind, bank):
    """Without a bank, of targets too."""
    inputs, _ = example(seed=3, kind=kind)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        fixed = on_device(inputs if bank else without_bank(inputs))
        arrays = {name: fixed.pop(name) for name in ("anchors", "targets")}
        if bank:
            fixed["targets"] = arrays.pop("targets")

        def loss(arrays):
            return contrastive_loss(**arrays, **fixed, kind=kind)[0]

        gradient = jax.jit(jax.grad(loss))(arrays)
        for _ in range(5):
            direction = {name: rng.normal(size=x.shape) for name, x in arrays.items()}
            forth, back = (
                jax.tree.map(lambda x, d, s=step: x + s * d, arrays, direction)
                for step in (1e-6, -1e-6)
            )
            difference = (loss(forth) - loss(back)) / 2e-6
            slope = sum((gradient[name] * direction[name]).sum() for name in arrays)
            np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)
            assert abs(difference) > 1e-3


def test_bank_rows_get_no_gradient():
    inputs, kind = example()
    inputs = on_device(inputs)
    _, gradient = gradient_of(inputs, "anchors", "bank_positives", "bank_negatives", kind=kind)
    assert gradient.pop("anchors").any()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", ["within", "cross"])
def test_permuting_videos_or_views_changes_nothing(kind):
    inputs, _ = example(seed=1, kind=kind)
    loss, metrics = contrastive_loss(**on_device(inputs), kind=kind)
    order = np.random.default_rng(0).permutation(5)
    for reorder in (lambda x: x[order], lambda x: x[:, ::-1] if x.ndim > 1 else x):
        moved = {name: x if np.ndim(x) == 0 else reorder(x) for name, x in inputs.items()}
        loss_moved, metrics_moved = contrastive_loss(**on_device(moved), kind=kind)
        np.testing.assert_allclose(loss_moved, loss, rtol=1e-5)
        for name in metrics:
            np.testing.assert_allclose(metrics_moved[name], metrics[name], rtol=1e-5, atol=1e-6)


def test_swapping_modalities_swaps_the_two_directions():
    """The term va, the mean of both directions, cannot depend on which modality is called video."""
    rng = np.random.default_rng(5)
    video, audio = (jnp.asarray(unit(rng, 4, 2, 8), jnp.float32) for _ in range(2))
    present = jnp.array([True, True, True, False]), jnp.array([True, False, True, True])
    arguments = {
        "source_id": jnp.arange(4),
        "temperature": 0.1,
        "positive_weight": 0.0,
        "kind": "cross",
    }

    def both(x, y, x_mask, y_mask):
        there, _ = contrastive_loss(x, y, anchor_mask=x_mask, target_mask=y_mask, **arguments)
        back, _ = contrastive_loss(y, x, anchor_mask=y_mask, target_mask=x_mask, **arguments)
        assert abs(there - back) > 1e-3  # the directions are different terms
        return (there + back) / 2

    np.testing.assert_allclose(
        both(video, audio, *present), both(audio, video, *present[::-1]), rtol=1e-6
    )


def test_positive_weight_changes_the_loss_only_with_bank_positives():
    inputs, kind = example(missing=0.0)
    inputs = on_device(inputs)
    loss = partial(contrastive_loss, kind=kind)
    losses = [float(loss(**(inputs | {"positive_weight": w}))[0]) for w in (0.0, 0.3, 0.6)]
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-3)
    assert abs(losses[1] - losses[0]) > 1e-2
    # None valid: the partner has weight 1, whatever λ.
    inputs["bank_positive_mask"] = jnp.zeros_like(inputs["bank_positive_mask"])
    for weight in (0.3, jnp.asarray(1.0)):
        value, _ = loss(**(inputs | {"positive_weight": weight}))
        np.testing.assert_allclose(value, losses[0], rtol=1e-6)


def test_zero_positive_weight_ignores_bank_positives_but_not_bank_negatives():
    inputs, kind = example(missing=0.0)
    inputs = on_device(inputs | {"positive_weight": 0.0})
    loss, _ = contrastive_loss(**inputs, kind=kind)
    for name, same in (("bank_positives", True), ("bank_negatives", False)):
        changed, _ = contrastive_loss(**(inputs | {name: -inputs[name]}), kind=kind)
        assert (abs(changed - loss) < 1e-6) == same


def test_no_negatives_is_zero_with_zero_gradient():
    inputs, kind = example(missing=0.0)
    inputs = without_bank(on_device(inputs | {"source_id": np.full(5, 7)}))
    loss, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    assert loss == 0
    assert not any(leaf.any() for leaf in gradient.values())


def test_same_source_is_neither_positive_nor_negative():
    inputs, _ = example(missing=0.0)
    inputs = without_bank(on_device(inputs | {"source_id": np.array([3, 8, 3, 9, 9])}))

    def first_video(targets):
        return per_anchor_loss(**(inputs | {"targets": targets}), kind="cross")[0][0].sum()

    gradient = np.abs(jax.jit(jax.grad(first_video))(inputs["targets"])).sum(-1)
    assert not gradient[2].any()  # another record of its source
    assert (gradient[[0, 1, 3, 4]] > 0).all()  # its partners; both views of other sources


def test_partner_is_other_view_within_and_same_view_across():
    inputs, _ = example(missing=0.0)
    inputs = without_bank(on_device(inputs | {"source_id": np.zeros(5, int)}))
    far = jnp.asarray(unit(np.random.default_rng(1), 5, 2, 1, 4))
    inputs |= {"bank_negatives": far, "bank_negative_mask": jnp.ones((5, 2, 1), bool)}
    for kind, used in (("within", 1), ("cross", 0)):

        def first(targets, kind=kind):
            return per_anchor_loss(**inputs | {"targets": targets}, kind=kind)[0][0, 0]

        changed = {
            (video, view)
            for video, view in np.ndindex(5, 2)
            if first(inputs["targets"].at[video, view].multiply(-1)) != first(inputs["targets"])
        }
        assert changed == {(0, used)}


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


def test_nobody_counts():
    inputs, kind = example(missing=1.0)
    inputs = on_device(inputs)
    loss, gradient = gradient_of(inputs, "anchors", "targets", kind=kind)
    assert loss == 0
    assert not any(leaf.any() for leaf in gradient.values())
    _, metrics = contrastive_loss(**inputs, kind=kind)
    assert metrics["anchors"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


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
    z, t, source = inputs["anchors"], inputs["targets"], inputs["source_id"]
    counted = inputs["anchor_mask"] & inputs["target_mask"]
    partners, negatives, first = [], [], []
    for i in np.flatnonzero(counted):
        others = t[inputs["target_mask"] & (source != source[i])].reshape(-1, z.shape[-1])
        for k in range(2):
            partners.append(z[i, k] @ t[i, k])
            negatives.extend(others @ z[i, k])
            if len(others):
                first.append(partners[-1] > (others @ z[i, k]).max())
    for rows in ("bank_positive", "bank_negative"):
        mask = inputs[f"{rows}_mask"] & counted[:, None, None]
        similarity = np.einsum("ikd,ikpd->ikp", z, inputs[f"{rows}s"])[mask].mean()
        # Means of cosines that cancel are known to the rounding of the cosines.
        np.testing.assert_allclose(metrics[f"{rows}_similarity"], similarity, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["positive_similarity"], np.mean(partners), rtol=1e-5)
    np.testing.assert_allclose(metrics["negative_similarity"], np.mean(negatives), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(first), rtol=1e-6)
    assert metrics["anchors"] == len(partners)
    assert 0 < np.mean(first) < 1


def test_accuracy_shows_a_collapse():
    """Embeddings in one point tie with every negative: that must read as 0, not as 1."""
    point = jnp.broadcast_to(jnp.array([0.6, 0.8]), (4, 2, 2))
    present = jnp.ones(4, bool)
    _, metrics = contrastive_loss(
        point,
        point,
        kind="within",
        source_id=jnp.arange(4),
        anchor_mask=present,
        target_mask=present,
        temperature=0.1,
        positive_weight=0.0,
    )
    assert metrics["accuracy"] == 0
    np.testing.assert_allclose(metrics["negative_similarity"], 1, rtol=1e-6)


def test_errors_name_what_is_wrong():
    inputs, _ = example()
    inputs = on_device(inputs)
    with pytest.raises(ValueError, match="bank_positives was given without bank_positive_mask"):
        contrastive_loss(**(inputs | {"bank_positive_mask": None}), kind="cross")
    with pytest.raises(ValueError, match="bank_negative_mask was given without bank_negatives"):
        contrastive_loss(**(inputs | {"bank_negatives": None}), kind="cross")
