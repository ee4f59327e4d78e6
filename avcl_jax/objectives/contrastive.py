"""Contrastive objective with sample-dependent positives and negatives.

For an anchor z with partner q (weight 1 − λ), bank positives p (sharing λ equally) and negatives n:

    l(z) = − Σ_p ω_p · log( e^{z·p/τ} / ( e^{z·p/τ} + Σ_n e^{z·n/τ} ) ),   Σ_p ω_p = 1

Each positive has its own denominator, so positives do not compete with each other. With E the
logarithm of the sum over negatives, one term is softplus(E − z·p/τ): the stable form used here.

Balanced gradients. Without a bank the objective does not change when all targets move by the same
vector. Bank rows get no gradient, which breaks this, and all embeddings run away together.
Therefore the loss keeps its value, and the gradients of *targets* are balanced: the partner's is
multiplied by 1 − P, where P is the fraction of bank rows in the sum over an anchor's negatives, and
targets get none from the terms of bank positives. The derivative along a shift of all targets is
then 0 for every anchor. Gradients of anchors do not change. Derivation and effect:
docs/balanced_gradients.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avcl_jax.objectives.views import per_view

Kind = Literal["within", "cross"]

# Stands for the logit of an excluded entry. Finite, so that neither values nor gradients rest on
# how a library treats −inf − (−inf); softplus(−1e30 − z·p/τ) and its gradient are 0 in float32.
_EXCLUDED = -1e30


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    # HIGHEST: the default multiplies float32 in bfloat16 (TPU) or TF32 (GPU), an error of 4e-3 in a
    # similarity, hence of 0.04 in a logit at τ = 0.1. These products are a tiny part of a step.
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def _present(values: Array, mask: Array) -> Array:
    """Casts to at least float32 and zeroes missing rows: their gradient is then 0, never NaN."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _bank_similarities(
    name: str,
    anchors: Float[Array, "videos 2 dim"],
    rows: Float[Array, "videos 2 rows dim"] | None,
    mask: Bool[Array, "videos 2 rows"] | None,
) -> tuple[Array, Array]:
    if (rows is None) != (mask is None):
        raise ValueError(f"bank_{name}s and bank_{name}_mask: give both or neither.")
    if rows is None or mask is None:
        shape = (*anchors.shape[:2], 0)
        return jnp.zeros(shape, anchors.dtype), jnp.zeros(shape, bool)
    if rows.shape != (*anchors.shape[:2], mask.shape[-1], anchors.shape[-1]):
        raise ValueError(
            f"bank_{name}s has shape {rows.shape}; with anchors {anchors.shape} and "
            f"bank_{name}_mask {mask.shape} it must be [videos, 2, rows, dim]."
        )
    return _dot("ikd,ikpd->ikp", anchors, _present(jax.lax.stop_gradient(rows), mask)), mask


def _log_sum_exp(logits: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    excluded = jnp.asarray(_EXCLUDED, logits.dtype)
    if any(logits.shape[axis] == 0 for axis in axes):
        return jnp.full(logits.shape[:2], excluded)
    return jax.nn.logsumexp(jnp.where(mask, logits, excluded), axis=axes)


def _masked_mean(values: Array, mask: Array) -> Array:
    total = jnp.where(mask, values, jnp.zeros((), values.dtype)).sum()
    return total / jnp.maximum(mask.sum(), 1).astype(values.dtype)


def contrastive_loss(
    anchors: Float[Array, "videos 2 dim"],
    targets: Float[Array, "videos 2 dim"],
    *,
    kind: Kind,
    source_id: Int[Array, " videos"],
    anchor_mask: Bool[Array, "videos *views"],
    target_mask: Bool[Array, "videos *views"],
    temperature: float | Float[Array, ""],
    positive_weight: float | Float[Array, ""],
    bank_positives: Float[Array, "videos 2 positives dim"] | None = None,
    bank_positive_mask: Bool[Array, "videos 2 positives"] | None = None,
    bank_negatives: Float[Array, "videos 2 negatives dim"] | None = None,
    bank_negative_mask: Bool[Array, "videos 2 negatives"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean of the objective over the anchors that exist and whose partner does.

    One direction of one term, for the global batch: `vv` and `aa` are "within" with the same array
    as anchors and targets; the term `va` is the mean of "cross" video → audio and audio → video.
    In-batch negatives of an anchor are all embeddings of `targets`, both views, of other sources
    whose target modality exists. Without any negative l = 0. Computed in float32, float64 if given.
    Gradients of targets are balanced, see the module.

    Args:
        anchors: L2-normalised embeddings of the anchor modality, any float dtype.
        targets: L2-normalised embeddings of the target modality.
        kind: Partner of an anchor. "within": the other view; "cross": the same view of the target
            modality.
        source_id: equal for records cut from one file.
        anchor_mask: [videos], or [videos, 2] of each view: the anchor modality exists.
        target_mask: the same of the target modality.
        temperature: τ > 0.
        positive_weight: λ in [0, 1], shared equally by an anchor's valid bank positives; if it has
            none, its partner has weight 1.
        bank_positives: rows of the target modality, without gradient, where their mask is set.
        bank_positive_mask: mask of `bank_positives`; both or neither are given.
        bank_negatives: rows of the target modality, likewise.
        bank_negative_mask: mask of `bank_negatives`.

    Returns:
        The scalar loss, 0 (with zero gradient) if no anchor counts, and metrics, which are the mean
        similarities `positive_similarity` (partner), `negative_similarity` (in-batch),
        `bank_positive_similarity` and `bank_negative_similarity`; `accuracy`, the fraction of
        anchors whose partner ranks strictly first among the in-batch negatives; `anchors`, the
        number of anchors that count. A mean over nothing is 0.

    Raises:
        ValueError: On shapes that do not fit, an unknown kind, or bank rows without their mask.
    """
    if kind not in ("within", "cross"):
        raise ValueError(f"kind is {kind!r}; it must be 'within' or 'cross'.")
    if anchors.ndim != 3 or anchors.shape[1] != 2 or anchors.shape != targets.shape:
        raise ValueError(
            f"anchors and targets must both be [videos, 2, dim]; got {anchors.shape} and "
            f"{targets.shape}."
        )
    anchor_mask, target_mask = per_view(anchor_mask), per_view(target_mask)
    anchors = _present(anchors, anchor_mask)
    targets = _present(targets, target_mask)
    partners, partner_mask = targets, target_mask
    if kind == "within":
        partners, partner_mask = targets[:, ::-1], target_mask[:, ::-1]
    counted = anchor_mask & partner_mask
    # Of the same source, whether the same record, another cut or a second meeting of it in one
    # global batch: neither negative nor (except the partner) positive.
    other_source = (source_id[:, None] != source_id[None, :])[..., None] & target_mask[None]
    is_negative = jnp.broadcast_to(other_source[:, None], (*counted.shape, *counted.shape))
    held_partners, held_targets = jax.lax.stop_gradient((partners, targets))
    # Similarities of anchors; those with held targets have the same values, but no gradient with
    # respect to the targets.
    partner = _dot("ikd,ikd->ik", anchors, partners)
    held_partner = _dot("ikd,ikd->ik", anchors, held_partners)
    batch = _dot("ikd,jld->ikjl", anchors, targets)
    held_batch = _dot("ikd,jld->ikjl", anchors, held_targets)
    bank_positive, is_bank_positive = _bank_similarities(
        "positive", anchors, bank_positives, bank_positive_mask
    )
    bank_negative, is_bank_negative = _bank_similarities(
        "negative", anchors, bank_negatives, bank_negative_mask
    )

    of_bank = _log_sum_exp(bank_negative / temperature, is_bank_negative, (2,))

    def negatives(batch: Array) -> Array:
        return jnp.logaddexp(_log_sum_exp(batch / temperature, is_negative, (2, 3)), of_bank)

    in_partner_term = negatives(batch)
    of_batch = jax.lax.stop_gradient(-jnp.expm1(of_bank - in_partner_term))  # 1 − P
    balanced = held_partner + of_batch * (partner - held_partner)
    partner_loss = jax.nn.softplus(in_partner_term - balanced / temperature)
    bank_losses = jax.nn.softplus(
        negatives(held_batch)[..., None] - bank_positive / temperature
    ) * is_bank_positive.astype(partner_loss.dtype)
    count = is_bank_positive.sum(-1).astype(partner_loss.dtype)
    bank_weight = jnp.where(count > 0, positive_weight, 0.0).astype(partner_loss.dtype)
    losses = (1 - bank_weight) * partner_loss
    losses = losses + bank_weight * bank_losses.sum(-1) / jnp.maximum(count, 1)

    ranked = counted & is_negative.any((2, 3))  # Rank 1 without negatives does not count.
    hardest = jnp.where(is_negative, batch, -jnp.inf).max((2, 3), initial=-jnp.inf)
    # Strictly first: when all embeddings are one point, accuracy is 0 and shows the collapse.
    first = (partner > hardest).astype(partner.dtype)
    of_counted = counted[..., None]
    metrics = {
        "positive_similarity": _masked_mean(partner, counted),
        "negative_similarity": _masked_mean(batch, is_negative & of_counted[..., None]),
        "bank_positive_similarity": _masked_mean(bank_positive, is_bank_positive & of_counted),
        "bank_negative_similarity": _masked_mean(bank_negative, is_bank_negative & of_counted),
        "accuracy": _masked_mean(first, ranked),
        "anchors": counted.sum(),
    }
    return _masked_mean(losses, counted), jax.lax.stop_gradient(metrics)
