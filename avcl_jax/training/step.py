"""One step of pretraining, written for the global batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.data.augment import PhotometricSpec, SpectralSpec
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.errors import UserError
from avcl_jax.objectives import bank_health, feature_bank
from avcl_jax.objectives.bank_sampling import Modality
from avcl_jax.objectives.contrastive import contrastive_loss
from avcl_jax.objectives.masks import per_view
from avcl_jax.objectives.temporal import TERMS as TEMPORAL_TERMS
from avcl_jax.objectives.temporal import temporal_losses
from avcl_jax.training import accumulate
from avcl_jax.training.inputs import prepare_inputs
from avcl_jax.training.sharding import data_axes, replicated, rows_sharding
from avcl_jax.training.state import TrainState

Metrics = dict[str, clu_metrics.Average]

MODALITIES: tuple[Modality, ...] = ("video", "audio")
# Term -> the directions whose mean it is: (anchor modality, target modality).
CONTRASTIVE_TERMS: Mapping[str, tuple[tuple[Modality, Modality], ...]] = {
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
        weights: weight of each term of `CONTRASTIVE_TERMS` and of the temporal terms if all its
            examples count; a term of weight 0 is not computed.
        temperature: of the contrastive terms.
        positive_weight: weight of the bank positives, λ in `objectives.contrastive`.
        bank: settings of sampling from the bank; None for in-batch terms only.
        bank_warmup_steps: steps in which the bank is filled but not used.
        bank_labels: names of labels whose agreement with sampled bank rows is logged.
    """

    weights: Mapping[str, float]
    temperature: float
    positive_weight: float
    bank: feature_bank.BankSampling | None
    bank_warmup_steps: int
    bank_labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses unknown terms, an objective without any, and numbers out of range."""
        known = {*CONTRASTIVE_TERMS, *TEMPORAL_TERMS}
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
        """Those of `terms` that have a weight."""
        return [term for term in terms if self.weights.get(term, 0.0) != 0.0]

    @property
    def bank_terms(self) -> tuple[tuple[Modality, Modality], ...]:
        """(anchor modality, target modality) of every draw from the bank in a step."""
        return tuple(
            direction
            for term in self.active(CONTRASTIVE_TERMS)
            for direction in CONTRASTIVE_TERMS[term]
        )


class TermLoss(NamedTuple):
    """One term of the objective in a batch.

    Attributes:
        value: mean over the examples that count, 0 if there are none.
        examples: how many count.
        per_video: examples of a video for which all count.
    """

    value: Array
    examples: Array
    per_video: int


def average(value: Array, count: Array | float = 1.0) -> clu_metrics.Average:
    """A mean with weight `count` for merging with those of other steps."""
    count = jnp.asarray(count, jnp.float32)
    value = jnp.where(count > 0, value.astype(jnp.float32), 0.0)
    return clu_metrics.Average(total=value * count, count=count)


def _playback(batch: Mapping[str, Array]) -> dict[Modality, Array]:
    """Number of the speed and direction of each view, int32 [videos, 2], by modality."""
    return {
        modality: 2 * batch[f"{modality}_speed"] + batch[f"{modality}_direction"]
        for modality in MODALITIES
    }


def _labels(batch: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Labels of videos, int32 [videos, labels], −1 unknown; one column without names."""
    unknown = jnp.full_like(batch["source_id"], -1)
    columns = [batch.get(f"label_{name}", unknown) for name in names]
    return jnp.stack(columns or [unknown], axis=1)


def _embeddings(
    outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> tuple[dict[Modality, Array], dict[Modality, Array]]:
    """Returns embeddings and masks of views; zeros and False for a modality without encoder."""
    present: dict[Modality, Array] = {}
    embeddings: dict[Modality, Array] = {}
    some = next(value for name, value in outputs.items() if name.endswith("_embeddings"))
    for modality in MODALITIES:
        name = f"{modality}_embeddings"
        embeddings[modality] = outputs.get(name, jnp.zeros_like(some))
        mask = per_view(batch[f"has_{modality}"])
        present[modality] = mask if name in outputs else jnp.zeros_like(mask)
    return embeddings, present


def _contrastive(
    embeddings: Mapping[Modality, Array],
    present: Mapping[Modality, Array],
    batch: Mapping[str, Array],
    state: TrainState,
    loss_spec: LossSpec,
    key: Array,
    mesh: Mesh,
) -> tuple[dict[str, TermLoss], Metrics]:
    """Losses of the active contrastive terms and their metrics."""
    playback, label = _playback(batch), _labels(batch, loss_spec.bank_labels)
    losses: dict[str, TermLoss] = {}
    metrics: Metrics = {}
    for term in CONTRASTIVE_TERMS:
        if term not in loss_spec.active(CONTRASTIVE_TERMS):
            continue
        directions = CONTRASTIVE_TERMS[term]
        values, counts = [], []
        for anchor, target in directions:
            rows: dict[str, Array] = {}
            name = term if len(directions) == 1 else f"{anchor[0]}{target[0]}"
            if loss_spec.bank is not None and state.bank is not None:
                drawn = feature_bank.sample(
                    state.bank,
                    key,
                    anchors_video=embeddings["video"],
                    anchors_audio=embeddings["audio"],
                    has_video=present["video"],
                    has_audio=present["audio"],
                    video_playback=playback["video"],
                    audio_playback=playback["audio"],
                    source_id=batch["source_id"],
                    anchor_id=batch["record_index"],
                    active=feature_bank.is_full(state.bank)
                    & (state.step >= loss_spec.bank_warmup_steps),
                    anchor_modality=anchor,
                    target_modality=target,
                    sampling=loss_spec.bank,
                    terms=loss_spec.bank_terms,
                    mesh=mesh if mesh.size > 1 else None,
                    data_axes=data_axes(mesh),
                )
                rows = {
                    "bank_positives": drawn.positives,
                    "bank_positive_mask": drawn.positive_mask,
                    "bank_negatives": drawn.negatives,
                    "bank_negative_mask": drawn.negative_mask,
                }
                health = bank_health.sample_metrics(
                    state.bank,
                    drawn,
                    modality=anchor,
                    playback=playback[anchor],
                    label=label,
                    label_names=loss_spec.bank_labels,
                )
                metrics |= {
                    f"{name}/bank_{metric}": average(*value) for metric, value in health.items()
                }
            value, info = contrastive_loss(
                embeddings[anchor],
                embeddings[target],
                kind="within" if anchor == target else "cross",
                source_id=batch["source_id"],
                anchor_mask=present[anchor],
                target_mask=present[target],
                temperature=loss_spec.temperature,
                positive_weight=loss_spec.positive_weight,
                **rows,
            )
            values.append(value)
            counts.append(info["anchors"])
            for metric in ("positive_similarity", "negative_similarity", "accuracy"):
                metrics[f"{name}/{metric}"] = average(info[metric], info["anchors"])
            if rows:
                for kind in ("positive", "negative"):
                    metrics[f"{name}/bank_{kind}_similarity"] = average(
                        info[f"bank_{kind}_similarity"], rows[f"bank_{kind}_mask"].sum()
                    )
        # Both directions of a pair count or neither does, so this is the mean over all anchors.
        mean, count = jnp.stack(values).mean(), jnp.stack(counts).sum()
        losses[term] = TermLoss(mean, count, 2 * len(directions))
    return losses, metrics


def total_loss(
    outputs: Mapping[str, Array],
    batch: Mapping[str, Array],
    *,
    state: TrainState,
    loss_spec: LossSpec,
    key: Array,
    mesh: Mesh,
) -> tuple[Array, tuple[Metrics, dict[Modality, Array], dict[Modality, Array]]]:
    """Weighted sum of the terms, as in `LossSpec`.

    Args:
        outputs: outputs of the model for the whole batch.
        batch: as `data.pipeline` delivers it.
        state: state before the step, for its `bank` and `step`.
        loss_spec: weights and settings.
        key: JAX random key of the draws from the bank.
        mesh: devices.

    Returns:
        The scalar, and metrics, embeddings of views and their masks.
    """
    embeddings, present = _embeddings(outputs, batch)
    losses, metrics = _contrastive(embeddings, present, batch, state, loss_spec, key, mesh)
    for term, (value, info) in temporal_losses(outputs, batch).items():
        losses[term] = TermLoss(value, info["count"], math.prod(outputs[term].shape[1:-1]))
        metrics[f"{term}/accuracy"] = average(info["accuracy"], info["count"])
    # Means alone would give the only video with audio in a batch the weight of a whole batch.
    readable = jnp.maximum(jnp.sum(~batch["unreadable"]), 1)
    weighted = []
    for term, loss in losses.items():
        metrics[f"{term}/loss"] = average(loss.value, loss.examples)
        fraction = loss.examples / (loss.per_video * readable)
        weighted.append(loss_spec.weights[term] * fraction * loss.value)
    total = jnp.stack(weighted).sum()
    metrics["loss"] = average(total)
    return total, (metrics, embeddings, present)


def _embedding_spread(embeddings: Array, present: Array) -> Array:
    """Standard deviation of the coordinates over the batch, times sqrt(dim).

    About 1 for embeddings spread over the sphere, 0 for a collapse to one point. Embeddings have
    length 1, so the norm of their mean is sqrt(1 - spread²).
    """
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    weight = present.reshape(-1, 1).astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    mean = (rows * weight).sum(axis=0, keepdims=True) / total
    variance = (jnp.square(rows - mean) * weight).sum(axis=0) / total
    return jnp.sqrt(variance.sum())


def average_weight(step: Array, decay: float) -> Array:
    """Weight of the newest values in the moving average, (1 − d) / (1 − d^(step + 1)).

    The weight of each step is then proportional to d to the power of its age: the bias-corrected
    average of Adam (Kingma & Ba, ICLR 2015, section 3), which excludes the initialisation.

    Args:
        step: int32 scalar, previous steps; at 0 the weight is 1.
        decay: d in (0, 1).
    """
    # `expm1` avoids the cancellation in 1 − d^(step + 1) if d is close to 1.
    return (1.0 - decay) / -jnp.expm1((step + 1) * math.log(decay))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    loss_spec: LossSpec,
    render: RenderSpec,
    augmentation: tuple[PhotometricSpec, SpectralSpec],
    pixel_mean: float,
    pixel_std: float,
    ema_decay: float,
    micro_batches: int,
    mesh: Mesh,
) -> Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, Metrics]]:
    """Builds the function `(state, batch, key) -> (state, metrics)`, for `jit_train_step`.

    `key` is the same at every step; the step number is folded in. Metrics are averages to merge
    over a log period: `<term>/loss` over the examples that count, `loss` over the steps. The model
    runs on `micro_batches` parts of a batch in turn, the losses on the whole batch
    (`training.accumulate`).

    Raises:
        UserError: if `ema_decay` is not in [0, 1).
    """
    if not 0 <= ema_decay < 1:
        raise UserError(f"optimizer.ema_decay {ema_decay} must be at least 0 and below 1")

    def train_step(
        state: TrainState, batch: Mapping[str, Array], key: Array
    ) -> tuple[TrainState, Metrics]:
        augment_key, bank_key = jax.random.split(jax.random.fold_in(key, state.step))
        inputs: Any = prepare_inputs(
            batch,
            render,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            augmentation=augmentation,
            key=augment_key,
        )
        # Outputs that no term reads would take memory for the whole batch.
        used = loss_spec.active(TEMPORAL_TERMS)

        def forward(params: Any, inputs: Any) -> tuple[dict[str, Array], Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, mutated = model.apply(variables, **inputs, train=True, mutable=["batch_stats"])
            outputs = {
                name: value
                for name, value in outputs.items()
                if name.endswith("_embeddings") or name in used
            }
            return outputs, mutated["batch_stats"]

        objective = functools.partial(
            total_loss,
            batch=batch,
            state=state,
            loss_spec=loss_spec,
            key=bank_key,
            mesh=mesh,
        )
        grads, (metrics, embeddings, present), statistics = accumulate.gradients(
            forward, objective, state.params, inputs, parts=micro_batches, mesh=mesh
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        batch_stats = accumulate.merge_statistics(
            state.batch_stats, statistics, accumulate.split_rows(present, micro_batches, mesh)
        )
        ema_params, ema_batch_stats = state.ema_params, state.ema_batch_stats
        if ema_params is not None:
            weight = average_weight(state.step, ema_decay)
            ema_params = optax.incremental_update(params, ema_params, weight)
            ema_batch_stats = optax.incremental_update(batch_stats, ema_batch_stats, weight)
        bank = state.bank
        if bank is not None:
            playback, label = _playback(batch), _labels(batch, loss_spec.bank_labels)
            health = bank_health.bank_metrics(
                bank,
                embeddings,
                present,
                playback=playback,
                label=label,
                label_names=loss_spec.bank_labels,
                source_id=batch["source_id"],
            )
            metrics |= {f"bank/{metric}": average(*value) for metric, value in health.items()}
            bank = feature_bank.insert(
                bank,
                embeddings["video"],
                embeddings["audio"],
                source_id=batch["source_id"],
                label=label,
                video_playback=playback["video"],
                audio_playback=playback["audio"],
                has_video=present["video"],
                has_audio=present["audio"],
                mesh=mesh if mesh.size > 1 else None,
                data_axes=data_axes(mesh),
            )
        readable = ~batch["unreadable"]
        for modality in MODALITIES:
            if f"{modality}_encoder" in grads:
                lacking = 1.0 - present[modality].mean(axis=1)
                metrics[f"data/without_{modality}"] = average(
                    jnp.sum(lacking, where=readable) / jnp.maximum(readable.sum(), 1),
                    readable.sum(),
                )
            metrics[f"health/{modality}_embedding_std"] = average(
                _embedding_spread(embeddings[modality], present[modality]),
                present[modality].any().astype(jnp.float32),
            )
        metrics["health/gradient_norm"] = average(optax.tree.norm(grads))
        for name in ("video_encoder", "audio_encoder"):
            if name in grads:
                metrics[f"health/{name}_gradient_norm"] = average(optax.tree.norm(grads[name]))
        metrics["health/parameter_norm"] = average(optax.tree.norm(params))
        metrics["learning_rate"] = average(jnp.asarray(schedule(state.step)))
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_batch_stats=ema_batch_stats,
            bank=bank,
        )
        return new_state, metrics

    return train_step


def jit_train_step(
    step: Callable[..., tuple[TrainState, Metrics]], mesh: Mesh, shardings: Any
) -> Any:
    """Jits a train step for the mesh; the state that goes in is donated to the one that comes out.

    Args:
        step: from `make_train_step`.
        mesh: devices.
        shardings: of the state.
    """
    rows, whole = rows_sharding(mesh), replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, rows, whole),
        out_shardings=(shardings, whole),
    )


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Merges the averages of two steps or periods."""
    return {name: first[name].merge(second[name]) for name in second}
