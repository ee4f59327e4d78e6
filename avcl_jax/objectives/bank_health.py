"""Health metrics of a feature bank: agreement and age of its samples, drift of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.objectives.bank_ranking import HIGHEST
from avcl_jax.objectives.bank_rows import BankSample
from avcl_jax.objectives.feature_bank import FeatureBank, age
from avcl_jax.objectives.views import Modality, Views

# Kinds of agreement that every bank has, besides its labels.
PLAYBACK_KINDS = ("speed", "direction")
# Videos of a batch whose rows in the bank measure the drift.
_DRIFT_VIDEOS = 8


def sample_metrics(
    bank: FeatureBank,
    sample: BankSample,
    views: Views,
    *,
    modality: Modality,
    label_names: Sequence[str],
) -> dict[str, tuple[Array, Array]]:
    """Age of the sampled rows, and agreement of their labels and playback with the anchor.

    Args:
        bank: The bank, before this step's insertion.
        sample: Result of `feature_bank.sample`.
        views: The batch.
        modality: Modality of the anchors.
        label_names: Names of the labels.

    Returns:
        Metric → (mean, number of values); the mean over nothing is 0. `positives`: positives per
        anchor; `age_rows`: rows inserted since the sampled positives; `positive_share/NAME` and
        `negative_share/NAME` for each label, "speed" and "direction": fraction of positives and of
        negatives that agree with the anchor. Compare with the base rates of `bank_metrics`.
    """
    # In float32: sums of ages overflow int32.
    ages = age(bank, sample.positives.numbers.insertion).astype(jnp.float32)
    count = sample.positives.mask.sum(-1)
    metrics = {
        "positives": (count.mean(), jnp.asarray(count.size)),
        "age_rows": _mean(ages, sample.positives.mask),
    }
    anchors = _kinds_of_views(views, modality, label_names)
    for name, drawn in (("positive", sample.positives), ("negative", sample.negatives)):
        rows = _kinds(drawn.numbers.playback(modality), drawn.numbers.label, label_names)
        for kind, own in anchors.items():
            known = drawn.mask & (rows[kind] >= 0) & (own >= 0)[..., None]
            same = (rows[kind] == own[..., None]).astype(jnp.float32)
            metrics[f"{name}_share/{kind}"] = _mean(same, known)
    return metrics


def _mean(values: Array, mask: Array) -> tuple[Array, Array]:
    """Mean over the mask, 0 over nothing, and the number of values."""
    count = mask.sum()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1), count


def _kinds(playback: Array, labels: Array, label_names: Sequence[str]) -> dict[str, Array]:
    """Numbers in which rows and anchors are compared; playback is 2 · speed + direction."""
    kinds = {name: labels[..., number] for number, name in enumerate(label_names)}
    return kinds | dict(zip(PLAYBACK_KINDS, (playback // 2, playback % 2), strict=True))


def _kinds_of_views(
    views: Views, modality: Modality, label_names: Sequence[str]
) -> dict[str, Array]:
    labels = jnp.repeat(views.label[:, None], 2, axis=1)
    return _kinds(views.playback[modality], labels, label_names)


def bank_metrics(
    bank: FeatureBank, views: Views, *, label_names: Sequence[str]
) -> dict[str, tuple[Array, Array]]:
    """Fill of the bank, base rates of agreement in a batch, and drift of rows.

    Args are those of `sample_metrics`.

    Returns:
        Metric → (mean, number of values); the mean over nothing is 0. `fill`: fraction of rows
        written; `base_rate/NAME` for each label, "speed" and "direction": fraction of pairs of
        views of different sources that agree; `MODALITY_same_source_similarity/HALF`: cosine of
        views with rows of their source in the "newer" and the "older" half of the bank. These rows
        are other views: compare with the similarity of two views of the batch.
    """
    metrics = {"fill": ((bank.rows.numbers.insertion >= 0).mean(), jnp.asarray(1))}
    source = jnp.repeat(views.source_id, 2)
    present = (views.present["video"] | views.present["audio"]).ravel()
    pairs = (source[:, None] != source[None]) & present[:, None] & present[None]
    for kind, values in _kinds_of_views(views, "video", label_names).items():
        flat = values.ravel()
        known = pairs & (flat >= 0)[:, None] & (flat >= 0)[None]
        same = (flat[:, None] == flat[None]).astype(jnp.float32)
        metrics[f"base_rate/{kind}"] = _mean(same, known)
    few, numbers = slice(_DRIFT_VIDEOS), bank.rows.numbers
    own = views.source_id[few, None] == numbers.source_id[None]
    old = age(bank, numbers.insertion) > bank.size // 2
    for modality, rows in bank.rows.embeddings.items():
        embeddings = views.embeddings[modality][few].astype(rows.dtype)
        cosine = jnp.einsum("vkd,rd->vkr", embeddings, rows, **HIGHEST)
        usable = own & bank.rows.usable(modality)[None]
        pairs = usable[:, None] & views.present[modality][few, :, None]
        for half, mask in (("newer", ~old), ("older", old)):
            name = f"{modality}_same_source_similarity/{half}"
            metrics[name] = _mean(cosine, pairs & mask[None, None])
    return metrics
