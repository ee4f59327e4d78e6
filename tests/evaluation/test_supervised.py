"""Training on labels: the stated stopping rule, and that it learns."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.evaluation.supervised import FitSpec, converged, fit_classifier
from avcl_jax.models.audio_encoders import AudioResNet

SPEC = FitSpec(
    batch_size=16,
    learning_rate=1e-2,
    weight_decay=0.01,
    loss_target=0.1,
    window=2,
    improvement=0.1,
    max_epochs=30,
    decay_epochs=3,
)
# A patch spans all bands: averaged over smaller ones, features would not know which band is loud.
ENCODER = AudioResNet(widths=(8,), depths=(0,), stem="patch", patch=(2, 6))


def _views(rng: np.random.Generator, items: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(items) % 3
    views = rng.normal(size=(items, 2, 8, 6)).astype(np.float32)
    views[np.arange(items), :, :, 2 * labels] += 3.0
    return views, np.repeat(labels[:, None], 2, axis=1)


def test_the_rule_of_convergence_is_the_stated_one():
    falling = [1.0, 0.95, 0.85, 0.8]
    assert converged(falling[:3], SPEC) is None  # two windows are not there yet
    assert converged(falling, SPEC) is None  # 0.825 is below 0.9 · 0.975
    assert converged([*falling, 0.84], SPEC) == "plateau"  # 0.82 is not below 0.9 · 0.9
    assert converged([*falling, 0.099], SPEC) == "target"
    halving = [0.5 / 1.2**epoch for epoch in range(30)]
    spec = dataclasses.replace(SPEC, loss_target=0.0)
    assert converged(halving[:29], spec) is None
    assert converged(halving, spec) == "max_epochs"


def test_it_learns_what_can_be_learned_and_generalises():
    rng = np.random.default_rng(0)
    views, labels = _views(rng, 64)
    fit = fit_classifier(
        ENCODER,
        views,
        {"class": labels},
        classes={"class": 3},
        prepare=jnp.asarray,
        spec=SPEC,
        seed=0,
    )
    assert fit.stopped == "target"
    assert fit.losses[-1] < SPEC.loss_target < fit.losses[0]
    assert (
        fit.losses[-1 - SPEC.decay_epochs] < SPEC.loss_target <= fit.losses[-2 - SPEC.decay_epochs]
    )
    test_views, test_labels = _views(rng, 50)
    logits = fit.predict(test_views[:, 0], batch_size=16)["class"]
    assert logits.shape == (50, 3)
    assert (logits.argmax(axis=-1) == test_labels[:, 0]).mean() > 0.9
    alone = fit.predict(test_views[7:8, 0], batch_size=16)["class"]
    np.testing.assert_allclose(alone[0], logits[7], atol=1e-5)
    assert set(fit.encoder_variables) == {"params", "batch_stats"}


class _Plain(nn.Module):
    """An encoder without batch statistics, as a transformer is."""

    @nn.compact
    def __call__(self, clips, *, train):
        del train
        return {"features": nn.Dense(4)(clips.reshape(len(clips), -1))}


def test_an_encoder_without_batch_norm_is_trained_and_handed_over():
    views, labels = _views(np.random.default_rng(3), 32)
    fit = fit_classifier(
        _Plain(),
        views,
        {"class": labels},
        classes={"class": 3},
        prepare=jnp.asarray,
        spec=dataclasses.replace(SPEC, max_epochs=1, decay_epochs=1),
        seed=0,
    )
    assert set(fit.encoder_variables) == {"params"}


def test_it_stops_on_a_plateau_where_nothing_can_be_learned():
    rng = np.random.default_rng(1)
    views = np.zeros((32, 1, 8, 6), np.float32)
    labels = rng.permutation(np.arange(32) % 2)[:, None]
    fit = fit_classifier(
        ENCODER,
        views,
        {"class": labels},
        classes={"class": 2},
        prepare=jnp.asarray,
        spec=SPEC,
        seed=0,
    )
    assert fit.stopped == "plateau"
    assert 2 * SPEC.window + SPEC.decay_epochs <= len(fit.losses) < SPEC.max_epochs
    assert fit.losses[-1] == pytest.approx(np.log(2), abs=0.1)


def test_bad_input_says_what_and_which():
    views, labels = _views(np.random.default_rng(2), 32)

    def fit(views, labels, spec=SPEC):
        return fit_classifier(
            ENCODER,
            views,
            {"class": labels},
            classes={"class": 3},
            prepare=jnp.asarray,
            spec=spec,
            seed=0,
        )

    with pytest.raises(ValueError, match="8 items do not fill one batch of 16"):
        fit(views[:8], labels[:8])
    with pytest.raises(ValueError, match=r"labels class \(32, 1\)"):
        fit(views, labels[:, :1])
    with pytest.raises(ValueError, match="training loss of epoch 0 is nan"):
        fit(views * np.nan, labels, dataclasses.replace(SPEC, max_epochs=2))
