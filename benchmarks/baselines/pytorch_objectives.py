"""The demo's objective and feature bank in PyTorch; for `pytorch_pretraining`.

The same function as `avcl_jax.objectives`, with all four directions of the contrastive terms (vv,
va, av, aa) in one array, because small operations cost PyTorch their start more than their work:
ranking happens once, one product gives all similarities within the batch, one those with the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Modality 0 is the picture, 1 the sound. Anchors' and targets' in the order vv, va, av, aa.
_ANCHORS, _TARGETS = [0, 0, 1, 1], [0, 1, 0, 1]
_EXCLUDED = -1e30


class BankRows(NamedTuple):
    """Past embeddings.

    Attributes:
        embeddings: [2, size, dim] of picture and sound.
        present: bool [2, size].
        source: int64 [size], -1 while a row is empty.
    """

    embeddings: Tensor
    present: Tensor
    source: Tensor


class Bank:
    """A ring of past embeddings.

    Args:
        size: of the ring.
        dim: of an embedding.
    """

    def __init__(self, size: int, dim: int) -> None:
        self.rows = BankRows(
            torch.zeros(2, size, dim),
            torch.zeros(2, size, dtype=torch.bool),
            torch.full((size,), -1),
        )
        self.inserted = 0

    @property
    def full(self) -> bool:
        """Whether every row has been written."""
        return self.inserted >= len(self.rows.source)

    def insert(self, embeddings: Tensor, present: Tensor, source: Tensor) -> None:
        """Writes [2, videos, 2, dim] over the oldest rows; present [2, videos]."""
        count = 2 * len(source)
        start = self.inserted % len(self.rows.source)
        ring = slice(start, start + count)
        kept = torch.where(present[..., None, None], embeddings.detach(), 0)
        self.rows.embeddings[:, ring] = kept.flatten(1, 2)
        self.rows.present[:, ring] = present.repeat_interleave(2, 1)
        self.rows.source[ring] = source.repeat_interleave(2)
        self.inserted += count


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Settings of the contrastive terms, those of `config.loss` and `config.bank`.

    Attributes:
        temperature: of the terms.
        positive_weight: share of the bank positives.
        num_positives: drawn from the first `positive_ranks`, one a source.
        num_negatives: drawn from the next `negative_ranks`.
        positive_ranks: see `num_positives`.
        negative_ranks: see `num_negatives`.
        sampling_temperature: of the draw.
    """

    temperature: float
    positive_weight: float
    num_positives: int
    num_negatives: int
    positive_ranks: int
    negative_ranks: int
    sampling_temperature: float


def rank(
    similarities: Tensor, anchor_source: Tensor, anchor_usable: Tensor, bank: BankRows, ranks: int
) -> tuple[Tensor, Tensor]:
    """The most similar rows of the bank by agreement: the lesser of both modalities' similarities.

    Args:
        similarities: [2, anchors, 2, size] of anchors with rows, by modality of either.
        anchor_source: [anchors].
        anchor_usable: bool [anchors], those that have picture and sound.
        bank: the rows.
        ranks: how many.

    Returns:
        Scores [anchors, ranks], -inf behind the last eligible one, and positions.
    """
    agreement = torch.minimum(similarities[0, :, 0], similarities[1, :, 1])
    usable = (bank.source >= 0) & bank.present.all(0)
    eligible = usable & anchor_usable[:, None] & (bank.source != anchor_source[:, None])
    scores, ranked = torch.where(eligible, agreement, -torch.inf).topk(ranks)
    return scores, ranked


def pick(
    scores: Tensor, ranked: Tensor, noise: Tensor, bank: BankRows, contrast: Contrast
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws among ranked rows by Gumbel top-k, of each source at most one positive.

    Args:
        scores: [anchors, ranks] from `rank`.
        ranked: positions, likewise.
        noise: [4, anchors, ranks] Gumbel noise of each direction.
        bank: for the sources.
        contrast: how many.

    Returns:
        Positions of positives [4, anchors, num_positives], their validity, and those of negatives.
    """
    perturbed = scores / contrast.sampling_temperature + noise
    near = perturbed[..., : contrast.positive_ranks]
    far = perturbed[..., contrast.positive_ranks :]
    source = bank.source[ranked[:, : contrast.positive_ranks]]
    same = source[:, None, :] == source[:, :, None]
    beaten = ((near[..., None, :] > near[..., :, None]) & same).any(-1)
    near, near_position = torch.where(beaten, -torch.inf, near).topk(contrast.num_positives)
    far, far_position = far.topk(contrast.num_negatives, sorted=False)
    ranked = ranked.expand(4, -1, -1)
    return (
        ranked.gather(2, near_position),
        near > -torch.inf,
        ranked.gather(2, far_position + contrast.positive_ranks),
        far > -torch.inf,
    )


def gumbel(shape: tuple[int, ...]) -> Tensor:
    """Gumbel noise."""
    return -torch.empty(shape).exponential_().log()


def contrastive_losses(
    embeddings: Tensor,
    present: Tensor,
    source: Tensor,
    bank: BankRows | None,
    contrast: Contrast,
    noise: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The terms vv, va and aa, and the fraction of the videos' anchors that each is the mean of.

    Args:
        embeddings: [2, videos, 2, dim] of pictures and sounds.
        present: bool [2, videos].
        source: [videos].
        bank: rows to draw from; None while it is not used.
        contrast: settings.
        noise: Gumbel noise [4, anchors, rows of the bank], if not to be drawn here.
    """
    videos, dim = source.shape[0], embeddings.shape[-1]
    anchors = 2 * videos
    flat = torch.where(present[..., None, None], embeddings, 0).reshape(2 * anchors, dim)
    # [4, anchors, targets]
    batch = (flat @ flat.T).reshape(2, anchors, 2, anchors).transpose(1, 2).flatten(0, 1)
    number = torch.arange(anchors)
    partner_position = torch.stack([number ^ 1, number, number, number ^ 1])
    partner = batch.gather(2, partner_position[..., None])[..., 0] / contrast.temperature
    source = source.repeat_interleave(2)
    there = present.repeat_interleave(2, 1)
    counted = there[_ANCHORS] & there[_TARGETS]
    negative = (source[:, None] != source) & there[_TARGETS][:, None]
    log_sum = torch.where(negative, batch / contrast.temperature, _EXCLUDED).logsumexp(-1)
    if bank is None:
        losses = functional.softplus(log_sum - partner)
    else:
        size = len(bank.source)
        # With all rows, which is less work than to fetch those that are drawn for every anchor.
        similarities = (flat @ bank.embeddings.flatten(0, 1).T).reshape(2, anchors, 2, size)
        with torch.no_grad():
            ranks = contrast.positive_ranks + contrast.negative_ranks
            scores, ranked = rank(similarities, source, there.all(0), bank, ranks)
            if noise is None:
                noise = gumbel((4, *scores.shape))
            else:
                noise = noise.gather(2, ranked.expand(4, -1, -1))
            near, valid, far, far_valid = pick(scores, ranked, noise, bank, contrast)
        similarities = similarities.transpose(1, 2).flatten(0, 1) / contrast.temperature
        far_logits = torch.where(far_valid, similarities.gather(2, far), _EXCLUDED)
        log_sum = torch.logaddexp(log_sum, far_logits.logsumexp(-1))
        drawn = functional.softplus(log_sum[..., None] - similarities.gather(2, near)) * valid
        count = valid.sum(-1)
        weight = torch.where(count > 0, contrast.positive_weight, 0.0)
        losses = (1 - weight) * functional.softplus(log_sum - partner)
        losses = losses + weight * drawn.sum(-1) / count.clamp(min=1)
    by_direction = torch.where(counted, losses, 0).sum(1) / counted.sum(1).clamp(min=1)
    vv, va, av, aa = by_direction.unbind()
    # As many anchors count in both directions of va.
    of_vv, of_va, _, of_aa = counted.float().mean(1).unbind()
    return {"vv": (vv, of_vv), "va": ((va + av) / 2, of_va), "aa": (aa, of_aa)}


def temporal_losses(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], present: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross-entropies of speed, direction and order over what counts, and the fraction that it is.

    Args:
        outputs: logits of the seven terms, as `avcl_jax.objectives.temporal`.
        batch: labels and masks, as the pipeline delivers them.
        present: bool [2, videos].
    """
    has_video, has_audio = present[0] & batch["video_moves"], present[1]
    order, order_mask = batch["order"], batch["order_mask"]
    targets = {
        "order_vv": (order, order_mask & has_video),
        "order_aa": (order, order_mask & has_audio),
        "order_va": (
            torch.stack([order, 2 - order], dim=1),
            (order_mask & has_video & has_audio)[:, None],
        ),
    }
    for name, has in (("video", has_video), ("audio", has_audio)):
        for task in ("speed", "direction"):
            mask = (batch[f"{task}_mask"] & has)[:, None]
            targets[f"{task}_{name}"] = (batch[f"{name}_{task}"], mask)
    losses = {}
    for term, (labels, mask) in targets.items():
        labels = torch.where(mask, labels, -100).flatten().long()
        logits = outputs[term].flatten(0, -2)
        total = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count = (labels >= 0).sum()
        losses[term] = (total / count.clamp(min=1), count / labels.numel())
    return losses
