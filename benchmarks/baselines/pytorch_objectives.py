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
        embeddings: [2, size, dim] of video and audio.
        present: bool [2, size].
        source: int64 [size], -1 while a row is empty.
        playback: int64 [size], number of the speed and direction.
    """

    embeddings: Tensor
    present: Tensor
    source: Tensor
    playback: Tensor


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
            torch.zeros(size, dtype=torch.int64),
        )
        self.inserted = 0

    @property
    def full(self) -> bool:
        """True if every row has been written."""
        return self.inserted >= len(self.rows.source)

    def insert(self, embeddings: Tensor, present: Tensor, source: Tensor, playback: Tensor) -> None:
        """Writes [2, videos, 2, dim] over the oldest rows; present [2, videos]."""
        count = 2 * len(source)
        start = self.inserted % len(self.rows.source)
        ring = slice(start, start + count)
        kept = torch.where(present[..., None, None], embeddings.detach(), 0)
        self.rows.embeddings[:, ring] = kept.flatten(1, 2)
        self.rows.present[:, ring] = present.repeat_interleave(2, 1)
        self.rows.source[ring] = source.repeat_interleave(2)
        self.rows.playback[ring] = playback.flatten()
        self.inserted += count


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Settings of the contrastive terms, those of `config.loss` and `config.bank`.

    Attributes:
        temperature: of the terms.
        positive_weight: weight of the bank positives.
        playbacks: number of playbacks.
        num_positives: drawn from the first `positive_ranks`, one per source.
        num_negatives: drawn from all rows except the nearest fraction `negative_offset`.
        positive_ranks: see `num_positives`.
        negative_offset: see `num_negatives`.
        sampling_temperature: of the draw of positives; that of negatives is uniform.
    """

    temperature: float
    positive_weight: float
    playbacks: int
    num_positives: int
    num_negatives: int
    positive_ranks: int
    negative_offset: float
    sampling_temperature: float


def agreement(embeddings: Tensor, playback: Tensor, bank: BankRows, contrast: Contrast) -> Tensor:
    """Minimum over both modalities of the similarities of anchors and rows by content.

    Args:
        embeddings: [2, anchors, dim] of video and audio.
        playback: [anchors].
        bank: the rows.
        contrast: settings.

    Returns:
        [anchors, size], cosines of embeddings minus the mean of their playback.
    """
    chosen = functional.one_hot(bank.playback, contrast.playbacks).T * bank.present[:, None]
    chosen = chosen.to(embeddings.dtype)
    means = (chosen @ bank.embeddings) / chosen.sum(-1, keepdim=True).clamp(min=1)
    queries = functional.normalize(embeddings - means[:, playback], dim=-1)
    rows = functional.normalize(bank.embeddings - means[:, bank.playback], dim=-1)
    return (queries @ rows.transpose(1, 2)).amin(0)


def pick(
    scores: Tensor, noise: Tensor, bank: BankRows, contrast: Contrast
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws positives by Gumbel top-k, at most one per source, and negatives uniformly.

    Args:
        scores: [anchors, size], -inf where not eligible.
        noise: [4, anchors, size] Gumbel noise of each direction.
        bank: rows, for their sources.
        contrast: settings.

    Returns:
        Positions of positives [4, anchors, num_positives], their validity, and those of negatives.
    """
    eligible = scores > -torch.inf
    count = eligible.sum(-1, keepdim=True)
    near_scores, ranked = scores.topk(contrast.positive_ranks)
    ranked = ranked.expand(4, -1, -1)
    near = near_scores / contrast.sampling_temperature + noise.gather(2, ranked)
    source = torch.where(near_scores > -torch.inf, bank.source[ranked[0]], -1)
    same = source[:, None, :] == source[:, :, None]
    beaten = ((near[..., None, :] > near[..., :, None]) & same).any(-1)
    few = count < 4 * contrast.positive_ranks
    near, position = torch.where(beaten | few, -torch.inf, near).topk(contrast.num_positives)

    left_out = (contrast.negative_offset * count).floor().long()
    threshold = scores.sort(descending=True)[0].gather(1, left_out)
    is_near = (bank.source[:, None] == source[:, None, :]).any(-1)
    far = torch.where(eligible & (scores <= threshold) & ~is_near, noise, -torch.inf)
    far, far_position = far.topk(contrast.num_negatives, sorted=False)
    return ranked.gather(2, position), near > -torch.inf, far_position, far > -torch.inf


def gumbel(shape: tuple[int, ...]) -> Tensor:
    """Gumbel noise."""
    return -torch.empty(shape).exponential_().log()


def contrastive_losses(
    embeddings: Tensor,
    present: Tensor,
    source: Tensor,
    playback: Tensor,
    bank: BankRows | None,
    contrast: Contrast,
    noise: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Terms vv, va and aa, each the mean over the anchors that count, and their fraction.

    Args:
        embeddings: [2, videos, 2, dim] of video and audio.
        present: bool [2, videos].
        source: [videos].
        playback: [videos, 2].
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
        # Of all rows: less work than fetching each anchor's samples.
        similarities = (flat @ bank.embeddings.flatten(0, 1).T).reshape(2, anchors, 2, size)
        with torch.no_grad():
            usable = (bank.source >= 0) & bank.present.all(0)
            views = flat.reshape(2, anchors, dim)
            scores = agreement(views, playback.flatten(), bank, contrast)
            eligible = usable & there.all(0)[:, None] & (bank.source != source[:, None])
            scores = torch.where(eligible, scores, -torch.inf)
            if noise is None:
                noise = gumbel((4, *scores.shape))
            near, valid, far, far_valid = pick(scores, noise, bank, contrast)
        similarities = similarities.transpose(1, 2).flatten(0, 1) / contrast.temperature
        far_logits = torch.where(far_valid, similarities.gather(2, far), _EXCLUDED)
        of_bank = far_logits.logsumexp(-1)
        # The balance of gradients: avcl_jax/objectives/contrastive.py.
        held = flat.detach()
        batch_held = (flat @ held.T).reshape(2, anchors, 2, anchors).transpose(1, 2).flatten(0, 1)
        partner_held = batch_held.gather(2, partner_position[..., None])[..., 0]
        partner_held = partner_held / contrast.temperature
        held_sum = torch.where(negative, batch_held / contrast.temperature, _EXCLUDED).logsumexp(-1)
        log_sum = torch.logaddexp(log_sum, of_bank)
        of_batch = -torch.expm1(of_bank - log_sum).detach()
        partner = partner_held + of_batch * (partner - partner_held)
        held_sum = torch.logaddexp(held_sum, of_bank)
        drawn = functional.softplus(held_sum[..., None] - similarities.gather(2, near)) * valid
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
    """Cross-entropies of the temporal terms over the examples that count, and their fraction.

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
