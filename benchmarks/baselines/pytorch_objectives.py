"""The demo's objective and feature bank in PyTorch; for `pytorch_pretraining`.

The same function as `avcl_jax.objectives` for videos that all have video and audio. All four
directions of the contrastive terms (vv, va, av, aa) are in one array, because the overhead of small
operations exceeds their work in PyTorch: rows are ranked once, one product gives all similarities
within the batch, and one those with the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ml_collections
import torch
from torch import Tensor
from torch.nn import functional

_EXCLUDED = -1e30


class BankRows(NamedTuple):
    """Past embeddings.

    Attributes:
        embeddings: [2, size, dim] of video and audio.
        source: int64 [size].
        playback: int64 [size], number of the speed and direction.
    """

    embeddings: Tensor
    source: Tensor
    playback: Tensor


class Bank:
    """A ring of past embeddings."""

    def __init__(self, size: int, dim: int) -> None:
        self.rows = BankRows(
            torch.zeros(2, size, dim), torch.full((size,), -1), torch.zeros(size, dtype=torch.int64)
        )
        self.inserted = 0

    @property
    def full(self) -> bool:
        """True if every row has been written."""
        return self.inserted >= len(self.rows.source)

    def insert(self, embeddings: Tensor, source: Tensor, playback: Tensor) -> None:
        """Writes [2, videos, 2, dim] over the oldest rows."""
        start = self.inserted % len(self.rows.source)
        ring = slice(start, start + 2 * len(source))
        self.rows.embeddings[:, ring] = embeddings.flatten(1, 2)
        self.rows.source[ring] = source.repeat_interleave(2)
        self.rows.playback[ring] = playback.flatten()
        self.inserted += 2 * len(source)


def agreement(embeddings: Tensor, playback: Tensor, bank: BankRows, playbacks: int) -> Tensor:
    """Minimum over both modalities of the similarities of anchors and rows by content.

    Args:
        embeddings: [2, anchors, dim] of video and audio.
        playback: [anchors].
        playbacks: number of playbacks.

    Returns:
        [anchors, size], cosines of embeddings minus the mean of their playback.
    """
    of_playback = functional.one_hot(bank.playback, playbacks).T.to(embeddings.dtype)
    means = (of_playback @ bank.embeddings) / of_playback.sum(-1, keepdim=True).clamp(min=1)
    queries = functional.normalize(embeddings - means[:, playback], dim=-1)
    rows = functional.normalize(bank.embeddings - means[:, bank.playback], dim=-1)
    return (queries @ rows.transpose(1, 2)).amin(0)


def pick(
    scores: Tensor, noise: Tensor, bank: BankRows, settings: ml_collections.ConfigDict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws positives by Gumbel top-k, at most one per source, and negatives uniformly.

    Args:
        scores: [anchors, size], -inf where not eligible.
        noise: [4, anchors, size] Gumbel noise of each direction.
        settings: `config.bank`.

    Returns:
        Positions of positives [4, anchors, num_positives] and their validity, and the same of
        negatives.
    """
    ranks = round(settings.positive_window * settings.size)
    eligible = scores > -torch.inf
    count = eligible.sum(-1, keepdim=True)
    near_scores, ranked = scores.topk(ranks)
    ranked = ranked.expand(4, -1, -1)
    near = near_scores / settings.temperature + noise.gather(2, ranked)
    source = torch.where(near_scores > -torch.inf, bank.source[ranked[0]], -1)
    same = source[:, None, :] == source[:, :, None]
    beaten = ((near[..., None, :] > near[..., :, None]) & same).any(-1)
    few = count < 4 * ranks
    near, position = torch.where(beaten | few, -torch.inf, near).topk(settings.num_positives)

    left_out = (settings.negative_offset * count).floor().long()
    threshold = scores.sort(descending=True)[0].gather(1, left_out)
    is_near = (bank.source[:, None] == source[:, None, :]).any(-1)
    far = torch.where(eligible & (scores <= threshold) & ~is_near, noise, -torch.inf)
    far, far_position = far.topk(settings.num_negatives, sorted=False)
    return ranked.gather(2, position), near > -torch.inf, far_position, far > -torch.inf


def gumbel(shape: tuple[int, ...]) -> Tensor:
    """Draws Gumbel noise."""
    return -torch.empty(shape).exponential_().log()


def contrastive_losses(
    embeddings: Tensor,
    source: Tensor,
    playback: Tensor,
    bank: BankRows | None,
    config: ml_collections.ConfigDict,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """Terms vv, va and aa, each the mean over anchors.

    Args:
        embeddings: [2, videos, 2, dim] of video and audio.
        source: [videos].
        playback: [videos, 2].
        bank: rows to draw from; None before the bank is in use.
        noise: Gumbel noise [4, anchors, rows of the bank]; drawn by default.
    """
    anchors, dim, temperature = 2 * source.shape[0], embeddings.shape[-1], config.loss.temperature
    flat = embeddings.reshape(2 * anchors, dim)

    def in_batch(targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of partners [4, anchors], and log-sum-exp of those of negatives."""
        products = (flat @ targets.T).reshape(2, anchors, 2, anchors).transpose(1, 2).flatten(0, 1)
        logits = products / temperature
        partner = logits.gather(2, partner_position[..., None])[..., 0]
        return partner, torch.where(negative, logits, _EXCLUDED).logsumexp(-1)

    number = torch.arange(anchors)
    partner_position = torch.stack([number ^ 1, number, number, number ^ 1])
    source = source.repeat_interleave(2)
    negative = source[:, None] != source
    partner, log_sum = in_batch(flat)
    if bank is None:
        losses = functional.softplus(log_sum - partner)
    else:
        size = len(bank.source)
        # Of all rows: less work than fetching the samples of each anchor.
        similarities = (flat @ bank.embeddings.flatten(0, 1).T).reshape(2, anchors, 2, size)
        with torch.no_grad():
            views = flat.reshape(2, anchors, dim)
            scores = agreement(views, playback.flatten(), bank, 2 * len(config.views.speeds))
            scores = torch.where(bank.source != source[:, None], scores, -torch.inf)
            if noise is None:
                noise = gumbel((4, *scores.shape))
            near, valid, far, far_valid = pick(scores, noise, bank, config.bank)
        similarities = similarities.transpose(1, 2).flatten(0, 1) / temperature
        far_logits = torch.where(far_valid, similarities.gather(2, far), _EXCLUDED)
        of_bank = far_logits.logsumexp(-1)
        # The balance of gradients: avcl_jax/objectives/contrastive.py.
        partner_held, held_sum = in_batch(flat.detach())
        log_sum = torch.logaddexp(log_sum, of_bank)
        of_batch = -torch.expm1(of_bank - log_sum).detach()
        partner = partner_held + of_batch * (partner - partner_held)
        held_sum = torch.logaddexp(held_sum, of_bank)
        drawn = functional.softplus(held_sum[..., None] - similarities.gather(2, near)) * valid
        count = valid.sum(-1)
        weight = torch.where(count > 0, config.loss.positive_weight, 0.0)
        losses = (1 - weight) * functional.softplus(log_sum - partner)
        losses = losses + weight * drawn.sum(-1) / count.clamp(min=1)
    vv, va, av, aa = losses.mean(1).unbind()
    return {"vv": vv, "va": (va + av) / 2, "aa": aa}


def temporal_losses(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross-entropies of the temporal terms over the examples in their masks, and their fraction.

    Args:
        outputs: logits of the seven terms, as in `avcl_jax.objectives.temporal`.
        batch: labels and masks of a batch of the pipeline.
    """
    order, order_mask, moves = batch["order"], batch["order_mask"], batch["video_moves"]
    targets = {
        "order_vv": (order, order_mask & moves),
        "order_aa": (order, order_mask),
        "order_va": (torch.stack([order, 2 - order], dim=1), (order_mask & moves)[:, None]),
    }
    for task in ("speed", "direction"):
        mask = batch[f"{task}_mask"]
        targets[f"{task}_video"] = (batch[f"video_{task}"], (mask & moves)[:, None])
        targets[f"{task}_audio"] = (batch[f"audio_{task}"], mask[:, None])
    losses = {}
    for term, (labels, mask) in targets.items():
        labels = torch.where(mask, labels, -100).flatten().long()
        logits = outputs[term].flatten(0, -2)
        total = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count = (labels >= 0).sum()
        losses[term] = (total / count.clamp(min=1), count / labels.numel())
    return losses
