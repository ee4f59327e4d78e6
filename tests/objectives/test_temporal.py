"""The temporal terms: cross-entropy, who counts in each, and what their labels say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.objectives import temporal

VIDEOS, SPEEDS = 6, 4
classification_loss = jax.jit(temporal.classification_loss)
temporal_losses = jax.jit(temporal.temporal_losses)
temporal_targets = jax.jit(temporal.temporal_targets)


def example(seed=0):
    """Outputs and batch in which media are missing and tasks are undefined, as numpy arrays."""
    rng = np.random.default_rng(seed)
    outputs = {
        "speed_video": rng.normal(size=(VIDEOS, 2, SPEEDS)),
        "speed_audio": rng.normal(size=(VIDEOS, 2, SPEEDS)),
        "direction_video": rng.normal(size=(VIDEOS, 2, 2)),
        "direction_audio": rng.normal(size=(VIDEOS, 2, 2)),
        "order_vv": rng.normal(size=(VIDEOS, 3)),
        "order_aa": rng.normal(size=(VIDEOS, 3)),
        "order_va": rng.normal(size=(VIDEOS, 2, 3)),
        "video_features": rng.normal(size=(VIDEOS, 2, 5)),
    }
    batch = {
        "has_video": np.array([1, 1, 1, 0, 1, 1], bool),
        "has_audio": np.array([1, 1, 0, 1, 1, 1], bool),
        "video_moves": np.ones(VIDEOS, bool),
        "speed_mask": np.array([1, 0, 1, 1, 1, 1], bool),
        "direction_mask": np.array([1, 1, 1, 1, 0, 1], bool),
        "order_mask": np.array([1, 1, 1, 1, 1, 0], bool),
        "order": np.array([0, 1, 2, 2, 0, 1]),
        "video_speed": rng.integers(0, SPEEDS, (VIDEOS, 2)),
        "audio_speed": rng.integers(0, SPEEDS, (VIDEOS, 2)),
        "video_direction": rng.integers(0, 2, (VIDEOS, 2)),
        "audio_direction": rng.integers(0, 2, (VIDEOS, 2)),
    }
    return {name: value.astype(np.float32) for name, value in outputs.items()}, batch


def expected(term, outputs, batch):
    """Mean cross-entropy, accuracy and count by loops over who counts."""
    task, modalities = term.split("_")
    entropies, correct = [], []
    for i in range(VIDEOS):
        if not batch[f"{task}_mask"][i]:
            continue
        video, audio = (np.broadcast_to(batch[f"has_{m}"][i], 2) for m in ("video", "audio"))
        if task != "order":
            present = video if modalities == "video" else audio
            pairs = [
                (outputs[term][i, k], batch[f"{modalities}_{task}"][i, k])
                for k in range(2)
                if present[k]
            ]
        elif term == "order_va":  # view 1's video with view 2's audio, and the reverse
            order = batch["order"][i]
            both = list(zip(outputs[term][i], (order, 2 - order), strict=True))
            pairs = [both[k] for k in range(2) if video[k] and audio[1 - k]]
        elif (video if term == "order_vv" else audio).all():
            pairs = [(outputs[term][i], batch["order"][i])]
        else:
            pairs = []
        for logits, label in pairs:
            entropies.append(np.log(np.exp(logits).sum()) - logits[label])
            correct.append(logits.argmax() == label)
    return np.mean(entropies), np.mean(correct), len(correct)


@pytest.mark.parametrize("by_view", [False, True])
@pytest.mark.parametrize("term", temporal.TASKS)
def test_terms_against_loops(term, by_view):
    outputs, batch = example()
    if by_view:
        batch["has_audio"] = batch["has_audio"][:, None] & np.array([[1, 0], [1, 1]] * 3, bool)
    losses = temporal_losses(outputs, batch)
    assert tuple(losses) == tuple(sorted(temporal.TASKS))
    alone = temporal_losses({term: outputs[term]}, batch)  # as of a model of one modality
    assert alone.keys() == {term}
    loss, metrics = losses[term]
    assert alone[term][0] == loss
    entropy, accuracy, count = expected(term, outputs, batch)
    np.testing.assert_allclose(loss, entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["count"] == count
    assert count < 2 * VIDEOS


def test_whatever_a_masked_entry_holds():
    outputs, batch = example()
    clean = temporal_losses(outputs, batch)
    for name, (_, mask) in temporal_targets(batch).items():
        assert not mask.all()
        outputs[name][~np.asarray(mask)] = np.nan
    for name in ("video_speed", "audio_speed"):
        batch[name][~batch["speed_mask"]] = -1
    losses = temporal_losses(outputs, batch)
    for term in temporal.TASKS:
        np.testing.assert_allclose(losses[term][0], clean[term][0], rtol=1e-6)
        assert losses[term][1]["accuracy"] == clean[term][1]["accuracy"]
    gradient = jax.jit(
        jax.grad(lambda o: sum(loss for loss, _ in temporal_losses(o, batch).values()))
    )(outputs)
    for term in temporal.TASKS:
        assert np.isfinite(gradient[term]).all()


def test_an_empty_term_is_zero_with_zero_gradient():
    outputs, batch = example()
    batch |= {name: np.zeros(VIDEOS, bool) for name in ("speed_mask", "has_audio")}
    losses = temporal_losses(outputs, batch)
    gradient = jax.jit(
        jax.grad(lambda o: sum(loss for loss, _ in temporal_losses(o, batch).values()))
    )(outputs)
    for term in temporal.TASKS:
        loss, metrics = losses[term]
        empty = term not in ("direction_video", "order_vv")
        assert (metrics["count"] == 0) == empty
        assert (loss == 0) == empty
        assert gradient[term].any() != empty
        assert np.isfinite(metrics["accuracy"])


def test_a_still_video_has_no_temporal_task_and_its_audio_has_all():
    _, batch = example()
    for name in ("has_video", "has_audio", "speed_mask", "direction_mask", "order_mask"):
        batch[name] = np.ones(VIDEOS, bool)
    batch["video_moves"] = np.arange(VIDEOS) != 2
    for term, (_, mask) in temporal_targets(batch).items():
        assert np.asarray(mask)[batch["video_moves"]].all()
        assert np.asarray(mask)[2].all() == term.endswith(("_audio", "_aa")), term


def test_half_precision_and_large_logits():
    logits = jnp.array([[300.0, -300.0], [-300.0, 300.0]], jnp.bfloat16)
    loss, metrics = classification_loss(logits, jnp.array([0, 0]), jnp.array([True, True]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (0 + 600) / 2, rtol=1e-2)
    assert metrics["accuracy"] == 0.5
