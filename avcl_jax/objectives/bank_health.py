"""Health metrics of a feature bank: agreement and age of its samples, drift of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avcl_jax.objectives.bank_exchange import PLAYBACK_COLUMN, ROW_NUMBERS
from avcl_jax.objectives.bank_sampling import Modality
from avcl_jax.objectives.feature_bank import BankSample, FeatureBank, age

# Kinds of agreement that every bank has, beside its labels.
PLAYBACK_KINDS = ("speed", "direction")
# Videos of a batch whose rows in the bank measure the drift.
_DRIFT_VIDEOS = 8


def sample_metrics(
    bank: FeatureBank,
    drawn: BankSample,
    *,
    modality: Modality,
    playback: Int[Array, "videos 2"],
    label: Int[Array, "videos labels"],
    label_names: Sequence[str],
) -> dict[str, tuple[Array, Array]]:
    """Age of the sampled rows, and agreement of their labels and playback with the anchor.

    Args:
        bank: The bank, before this step's insertion.
        drawn: Result of `feature_bank.sample`.
        modality: Modality of the anchors.
        playback: int [videos, 2] of the anchors.
        label: int [videos, labels] of the anchors, −1 unknown.
        label_names: Names of the labels.

    Returns:
        Metric → (mean, number of values); the mean over nothing is 0. `positives`: positives per
        anchor; `age_rows`: rows inserted since the sampled positives; `positive_share/NAME` and
        `negative_share/NAME` for each label, "speed" and "direction": fraction of positives and of
        negatives that agree with the anchor. Compare with the base rates of `bank_metrics`.
    """

    # In float32: sums of ages overflow int32.
    ages = age(bank, drawn.positive_numbers[..., 0]).astype(jnp.float32)
    anchors = math.prod(drawn.positive_mask.shape[:2])
    found = {
        "positives": (drawn.positive_mask.sum(-1).mean(), jnp.asarray(anchors)),
        "age_rows": _mean(ages, drawn.positive_mask),
    }
    kinds = _kinds(playback, jnp.repeat(label[:, None], 2, axis=1), label_names)
    column = PLAYBACK_COLUMN[modality]
    for name, numbers, mask in (
        ("positive", drawn.positive_numbers, drawn.positive_mask),
        ("negative", drawn.negative_numbers, drawn.negative_mask),
    ):
        rows = _kinds(numbers[..., column], numbers[..., ROW_NUMBERS:], label_names)
        for kind, own in kinds.items():
            known = mask & (rows[kind] >= 0) & (own >= 0)[..., None]
            same = (rows[kind] == own[..., None]).astype(jnp.float32)
            found[f"{name}_share/{kind}"] = _mean(same, known)
    return found


def _mean(values: Array, mask: Array) -> tuple[Array, Array]:
    """Mean over the mask, 0 over nothing, and the number of values."""
    count = mask.sum()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1), count


def _kinds(playback: Array, labels: Array, label_names: Sequence[str]) -> dict[str, Array]:
    """Numbers in which rows and anchors are compared; playback is 2 · speed + direction."""
    kinds = {name: labels[..., number] for number, name in enumerate(label_names)}
    return kinds | dict(zip(PLAYBACK_KINDS, (playback // 2, playback % 2), strict=True))


def _base_rates(
    kinds: Mapping[str, Array], source_id: Array, present: Array
) -> dict[str, tuple[Array, Array]]:
    source, there = jnp.repeat(source_id, 2), present.ravel()
    pairs = (source[:, None] != source[None]) & there[:, None] & there[None]
    rates = {}
    for kind, values in kinds.items():
        flat = values.ravel()
        known = pairs & (flat >= 0)[:, None] & (flat >= 0)[None]
        rates[kind] = _mean((flat[:, None] == flat[None]).astype(jnp.float32), known)
    return rates


def _row_drift(
    bank: FeatureBank, modality: Modality, embeddings: Array, source_id: Array, present: Array
) -> dict[str, tuple[Array, Array]]:
    few = slice(_DRIFT_VIDEOS)
    rows, there = getattr(bank, modality), getattr(bank, f"has_{modality}")
    cosine = jnp.einsum("vkd,rd->vkr", embeddings[few].astype(rows.dtype), rows).astype("f4")
    same = source_id[few, None] == bank.source_id[None]
    same = same & (there & (bank.insertion >= 0))[None]
    pairs = same[:, None] & present[few, :, None]
    old = age(bank, bank.insertion) > bank.insertion.shape[0] // 2
    halves = {"newer": ~old, "older": old}
    return {name: _mean(cosine, pairs & half[None, None]) for name, half in halves.items()}


def bank_metrics(
    bank: FeatureBank,
    embeddings: Mapping[Modality, Float[Array, "videos 2 dim"]],
    present: Mapping[Modality, Bool[Array, "videos 2"]],
    *,
    playback: Mapping[Modality, Int[Array, "videos 2"]],
    label: Int[Array, "videos labels"],
    label_names: Sequence[str],
    source_id: Int[Array, " videos"],
) -> dict[str, tuple[Array, Array]]:
    """Fill of the bank, base rates of agreement in a batch, and drift of rows.

    Args:
        bank: The bank, before this step's insertion.
        embeddings: By modality, [videos, 2, dim].
        present: By modality, bool [videos, 2].
        playback: By modality, int [videos, 2].
        label: int [videos, labels], −1 unknown.
        label_names: Names of the labels.
        source_id: int [videos].

    Returns:
        Metric → (mean, number of values); the mean over nothing is 0. `fill`: fraction of rows
        written; `base_rate/NAME` for each label, "speed" and "direction": fraction of pairs of
        views of different sources that agree; `MODALITY_same_source_similarity/HALF`: cosine of
        views with rows of their source in the "newer" and the "older" half of the bank. These rows
        are other views: compare with the similarity of two views of the batch.
    """
    found = {"fill": ((bank.insertion >= 0).mean(), jnp.asarray(1))}
    either = present["video"] | present["audio"]
    kinds = _kinds(playback["video"], jnp.repeat(label[:, None], 2, axis=1), label_names)
    for kind, rate in _base_rates(kinds, source_id, either).items():
        found[f"base_rate/{kind}"] = rate
    for modality in embeddings:
        drift = _row_drift(bank, modality, embeddings[modality], source_id, present[modality])
        for half, cosine in drift.items():
            found[f"{modality}_same_source_similarity/{half}"] = cosine
    return found
