"""Objective of a batch: the contrastive and the temporal terms, weighted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.errors import UserError
from avcl_jax.objectives import bank_health, feature_bank
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.contrastive import contrastive_loss
from avcl_jax.objectives.temporal import TASKS, temporal_losses
from avcl_jax.objectives.views import MODALITIES, Modality, Term, Views, per_view
from avcl_jax.training.averages import Metrics, average
from avcl_jax.training.state import TrainState

# Term -> the pairs of (anchor modality, target modality) whose mean it is.
CONTRASTIVE_TERMS: Mapping[str, tuple[Term, ...]] = {
    "vv": (("video", "video"),),
    "va": (("video", "audio"), ("audio", "video")),
    "aa": (("audio", "audio"),),
}


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """Weights of the objective.

    Each term is a mean over those of its examples (anchors or classifications) that count in a
    batch. In the total, its weight is multiplied by their fraction of all its examples in the
    readable videos of the batch, so that an example has the same weight in every batch.

    Attributes:
        weights: weight of each term of `CONTRASTIVE_TERMS` and of the temporal `TASKS` if all its
            examples count; a term of weight 0 is not computed.
        temperature: τ in `objectives.contrastive`.
        positive_weight: weight of the bank positives, λ in `objectives.contrastive`.
        bank: settings of sampling from the bank; None for in-batch terms only.
        bank_warmup_steps: steps in which the bank is filled but not used.
        bank_labels: names of labels whose agreement with sampled bank rows is logged.
    """

    weights: Mapping[str, float]
    temperature: float
    positive_weight: float
    bank: BankSampling | None
    bank_warmup_steps: int
    bank_labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses unknown terms, an objective without any, and numbers out of range."""
        known = {*CONTRASTIVE_TERMS, *TASKS}
        if unknown := sorted(set(self.weights) - known):
            raise UserError(
                f"unknown loss terms {', '.join(unknown)}: the terms are {', '.join(sorted(known))}"
            )
        if not any(self.weights.values()):
            raise UserError("all loss weights are 0: nothing would be learned")
        if not 0 <= self.positive_weight <= 1:
            raise UserError(f"loss.positive_weight {self.positive_weight} must be from 0 to 1")
        if not self.temperature > 0:
            raise UserError(f"loss.temperature {self.temperature} must be positive")

    def active(self, terms: Iterable[str]) -> list[str]:
        """Terms among `terms` with a weight."""
        return [term for term in terms if self.weights.get(term, 0.0) != 0.0]

    @property
    def bank_terms(self) -> tuple[Term, ...]:
        """Pairs of all active contrastive terms; for each a step draws from the bank once."""
        return tuple(
            pair for term in self.active(CONTRASTIVE_TERMS) for pair in CONTRASTIVE_TERMS[term]
        )


def _views(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], label_names: Iterable[str]
) -> Views:
    """Views of a batch, with one column of unknown labels if `label_names` is empty.

    A modality without an encoder is present in none.
    """
    encoded = {m: outputs[name] for m in MODALITIES if (name := f"{m}_embeddings") in outputs}
    absent = jnp.zeros_like(next(iter(encoded.values())))
    present: dict[Modality, Array] = {}
    for modality in MODALITIES:
        mask = per_view(batch[f"has_{modality}"])
        present[modality] = mask if modality in encoded else jnp.zeros_like(mask)
    unknown = jnp.full_like(batch["source_id"], -1)
    labels = [batch.get(f"label_{name}", unknown) for name in label_names]
    return Views(
        embeddings={modality: encoded.get(modality, absent) for modality in MODALITIES},
        present=present,
        playback={m: 2 * batch[f"{m}_speed"] + batch[f"{m}_direction"] for m in MODALITIES},
        label=jnp.stack(labels or [unknown], axis=1),
        source_id=batch["source_id"],
        record_index=batch["record_index"],
    )


def _pair_loss(
    views: Views, term: Term, state: TrainState, loss_spec: LossSpec, key: Array, mesh: Mesh
) -> tuple[Array, Array, Metrics]:
    """Loss of one anchor and target modality, number of valid anchors, and metrics."""
    anchor, target = term
    rows: dict[str, Array] = {}
    metrics: Metrics = {}
    if loss_spec.bank is not None and state.bank is not None:
        sample = feature_bank.sample(
            state.bank,
            key,
            views,
            term=term,
            terms=loss_spec.bank_terms,
            sampling=loss_spec.bank,
            active=feature_bank.is_full(state.bank) & (state.step >= loss_spec.bank_warmup_steps),
            mesh=mesh,
        )
        health = bank_health.sample_metrics(
            state.bank, sample, views, modality=anchor, label_names=loss_spec.bank_labels
        )
        metrics |= {f"bank_{name}": average(*value) for name, value in health.items()}
        rows = {
            "bank_positives": sample.positives.embeddings,
            "bank_positive_mask": sample.positives.mask,
            "bank_negatives": sample.negatives.embeddings,
            "bank_negative_mask": sample.negatives.mask,
        }
    loss, info = contrastive_loss(
        views.embeddings[anchor],
        views.embeddings[target],
        kind="within" if anchor == target else "cross",
        source_id=views.source_id,
        anchor_mask=views.present[anchor],
        target_mask=views.present[target],
        temperature=loss_spec.temperature,
        positive_weight=loss_spec.positive_weight,
        **rows,
    )
    for name in ("positive_similarity", "negative_similarity", "accuracy"):
        metrics[name] = average(info[name], info["anchors"])
    for kind in ("positive", "negative") if rows else ():
        name = f"bank_{kind}_similarity"
        metrics[name] = average(info[name], rows[f"bank_{kind}_mask"].sum())
    return loss, info["anchors"], metrics


def total_loss(
    outputs: Mapping[str, Array],
    batch: Mapping[str, Array],
    *,
    state: TrainState,
    loss_spec: LossSpec,
    key: Array,
    mesh: Mesh,
) -> tuple[Array, tuple[Metrics, Views]]:
    """Weighted sum of the terms, as in `LossSpec`.

    Args:
        outputs: outputs of the model for the whole batch.
        batch: batch of `data.pipeline`.
        state: state before the step, for its `bank` and `step`.
        key: key of the draws from the bank.

    Returns:
        The scalar, and metrics and the views of the batch.
    """
    views = _views(outputs, batch, loss_spec.bank_labels)
    # Term -> mean over the examples that count, how many count, and examples of a whole video.
    losses: dict[str, tuple[Array, Array, int]] = {}
    metrics: Metrics = {}
    for term in loss_spec.active(CONTRASTIVE_TERMS):
        values, counts = [], []
        for pair in CONTRASTIVE_TERMS[term]:
            value, count, info = _pair_loss(views, pair, state, loss_spec, key, mesh)
            values.append(value)
            counts.append(count)
            name = "".join(modality[0] for modality in pair)
            metrics |= {f"{name}/{metric}": mean for metric, mean in info.items()}
        # Both pairs of va count or neither does, so this is the mean over all anchors.
        losses[term] = jnp.stack(values).mean(), jnp.stack(counts).sum(), 2 * len(values)
    for term, (value, info) in temporal_losses(outputs, batch).items():
        losses[term] = value, info["count"], math.prod(outputs[term].shape[1:-1])
        metrics[f"{term}/accuracy"] = average(info["accuracy"], info["count"])
    # Means alone would give the only video with audio in a batch the weight of a whole batch.
    readable = jnp.maximum(jnp.sum(~batch["unreadable"]), 1)
    weighted = []
    for term, (value, count, per_video) in losses.items():
        metrics[f"{term}/loss"] = average(value, count)
        weighted.append(loss_spec.weights[term] * (count / (per_video * readable)) * value)
    total = jnp.stack(weighted).sum()
    metrics["loss"] = average(total)
    return total, (metrics, views)
