"""The demo's pretraining step in PyTorch, tuned as by an expert for a CPU.

The whole step of configs/pretrain.py:demo: augmentation of uint8 clips and of spectrograms, both
encoders, all heads, all contrastive terms with the feature bank, all temporal terms, gradient
clipping, AdamW with our schedule and mask, insertion into the bank. Left out: metrics other than
losses (accuracies, norms, ages of bank rows), which a PyTorch user would compute at log steps only,
and masks for missing modalities, because all records of the demo have video and audio.
tests/interop/test_torch_pretraining.py shows that both compute the same.

Tuned: channels last, everything up to the total loss compiled as one graph or eager (the benchmark
takes the better), AdamW fused over all tensors, gradients set to None, one thread per core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baselines.pytorch_networks import AudioVisualNetwork
from benchmarks.baselines.pytorch_objectives import (
    Bank,
    BankRows,
    contrastive_losses,
    temporal_losses,
)


def _playback(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the number of the speed and direction of each view, int64 [videos, 2]."""
    return 2 * batch["video_speed"].long() + batch["video_direction"].long()


def photometric(video: Tensor, draws: Tensor, settings: ml_collections.ConfigDict) -> Tensor:
    """`avcl_jax.data.augment.photometric` of pixels in [0, 1], [videos, 2, time, h, w, 3].

    Args:
        draws: [5, videos, 2] brightness, contrast, saturation, grey and hue of each clip, uniform
            in [-1, 1] except grey, in [0, 1].
    """
    brightness, contrast, saturation, gray_draw, hue = (
        draw.reshape(*draw.shape, 1, 1, 1) for draw in draws
    )
    saturation = 1 + settings.saturation * saturation
    saturation = saturation * (gray_draw >= settings.gray_probability)
    contrast = 1 + settings.contrast * contrast
    turn = 2 * math.pi * settings.hue * hue
    red, green, blue = video.unbind(-1)
    mean = (red + green + blue) / 3
    along, across = turn.cos(), turn.sin() / math.sqrt(3)
    red, green, blue = (
        mean + along * (colour - mean) + across * (after - before)
        for colour, before, after in ((red, green, blue), (green, blue, red), (blue, red, green))
    )
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    gain = contrast * saturation
    common = (contrast - gain) * gray + (0.5 - 0.5 * contrast + settings.brightness * brightness)
    return torch.stack([gain * colour + common for colour in (red, green, blue)], dim=-1)


def spectral(
    spectrogram: Tensor,
    settings: ml_collections.ConfigDict,
    *,
    knots: Tensor,
    width: Tensor,
    first: Tensor,
    noise: Tensor,
) -> Tensor:
    """`avcl_jax.data.augment.spectral` of [videos, 2, frames, mels].

    Args:
        knots: [videos, 2, knots] uniform in [-1, 1].
        width: int [videos, 2, 1] number of masked bands.
        first: [videos, 2, 1] uniform in [0, 1], the position of the first.
        noise: [videos, 2, frames, mels] normal.
    """
    mels = spectrogram.shape[-1]
    curve = functional.interpolate(knots, mels, mode="linear")
    curve = settings.equalizer * (curve - curve.mean(-1, keepdim=True))
    first = (first * (mels - width + 1)).floor()
    band = torch.arange(mels)
    masked = (band >= first) & (band < first + width)
    quiet = spectrogram.amin((2, 3), keepdim=True)
    changed = spectrogram + curve[:, :, None] + settings.noise * noise
    return torch.where(masked[:, :, None], quiet, changed)


class Pretraining:
    """The step and its state.

    Args:
        config: configs/pretrain.py:demo, or one of the same networks.
        compiled: compile forward, objective and backward.
    """

    def __init__(self, config: ml_collections.ConfigDict, *, compiled: bool) -> None:
        implemented = {
            "space": "agreement",
            "ranking": "content",
            "positive_sampling": "gumbel",
            "negative_sampling": "uniform",
            "negative_candidates": config.bank.size,
        }
        if others := [key for key, value in implemented.items() if config.bank[key] != value]:
            raise ValueError(f"only a bank with {implemented} is implemented: set {others}")
        if config.photometric.per_frame or config.spectrogram.where != "host":
            raise ValueError(
                "only augmentation per clip and spectrograms of the host are implemented"
            )
        self.config = config
        self.network = AudioVisualNetwork(config)
        self.bank = Bank(config.bank.size, config.model.embedding_dim)
        self.steps = 0
        self.optimizer = optimizer(self.network, config.optimizer)
        self._losses = torch.compile(self.losses) if compiled else self.losses

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Augmented pixels and spectrograms of a batch, standardised."""
        config = self.config
        shape = batch["video"].shape[:2]
        video = batch["video"].float() / 255
        uniform = torch.rand(5, *shape)
        signed = 2 * uniform - 1
        draws = torch.stack([signed[0], signed[1], signed[2], uniform[3], signed[4]])
        video = photometric(video, draws, config.photometric)
        video = (video - config.pixels.mean) / config.pixels.std
        settings, spectrogram = config.spectral, batch["spectrogram"]
        return video, spectral(
            spectrogram,
            settings,
            knots=2 * torch.rand(*shape, settings.equalizer_knots) - 1,
            width=torch.randint(0, settings.mask_mels + 1, (*shape, 1)),
            first=torch.rand(*shape, 1),
            noise=torch.randn_like(spectrogram),
        )

    def losses(
        self, batch: Mapping[str, Tensor], bank: BankRows | None, noise: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The weighted sum of all terms, the terms, and the embeddings.

        Args:
            batch: tensors of a batch of the pipeline.
            bank: rows to draw from; None before the bank is in use.
            noise: see `contrastive_losses`.
        """
        with torch.no_grad():
            video, spectrogram = self.inputs(batch)
        outputs = self.network(video, spectrogram)
        embeddings = torch.stack([outputs["video_embeddings"], outputs["audio_embeddings"]])
        terms = contrastive_losses(
            embeddings, batch["source_id"], _playback(batch), bank, self.config, noise
        )
        weights = self.config.loss.weights
        weighted = [weights[term] * value for term, value in terms.items()]
        # Fractions are of all rows, because every record of the demo is readable.
        for term, (value, fraction) in temporal_losses(outputs, batch).items():
            terms[term] = value
            weighted.append(weights[term] * fraction * value)
        return torch.stack(weighted).sum(), terms, embeddings.detach()

    def step(
        self, batch: Mapping[str, Tensor], noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Takes one step on `to_tensors` of a batch; returns the loss and its terms."""
        section = self.config.optimizer
        active = self.bank.full and self.steps >= self.config.bank.warmup_steps
        total, terms, embeddings = self._losses(batch, self.bank.rows if active else None, noise)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), section.clip_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, section, self.config.steps)
        self.optimizer.step()
        self.bank.insert(embeddings, batch["source_id"], _playback(batch))
        self.steps += 1
        return total.detach(), {term: value.detach() for term, value in terms.items()}


def optimizer(network: nn.Module, section: ml_collections.ConfigDict) -> torch.optim.Optimizer:
    """AdamW that decays kernels only; the learning rate is set before each step."""
    parameters = list(network.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=section.learning_rate,
        betas=(section.momentum, section.beta2),
        fused=True,
    )


def learning_rate(step: int, section: ml_collections.ConfigDict, steps: int) -> float:
    """Linear warm-up from 0, then cosine to 0."""
    if step < section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    fraction = (step - section.warmup_steps) / (steps - section.warmup_steps)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def to_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors of a batch; int32 as int64, because PyTorch indexes by these."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {
        name: tensor.long() if tensor.dtype == torch.int32 else tensor
        for name, tensor in tensors.items()
    }


def seconds_of_steps(*, steps: int, compiled: bool) -> list[float]:
    """Seconds of each of `steps` steps of the demo with its bank in use."""
    from avcl_jax.configs import pretrain
    from benchmarks.batches import random_batch
    from benchmarks.measure import seconds_of_each
    from benchmarks.steps import WARM_UP_STEPS

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = pretrain.get_config("demo")
    pretraining = Pretraining(config, compiled=compiled)
    batch: Any = to_tensors(random_batch(config))
    fill_bank(pretraining)
    return seconds_of_each(lambda: pretraining.step(batch)[0].item(), steps, warmup=WARM_UP_STEPS)


def fill_bank(pretraining: Pretraining) -> None:
    """Fills the bank with random embeddings of other videos, as after its warm-up."""
    config, bank = pretraining.config, pretraining.bank
    videos = config.global_batch_size
    while not bank.full:
        embeddings = functional.normalize(
            torch.randn(2, videos, 2, config.model.embedding_dim), dim=-1
        )
        source = bank.inserted + videos + torch.arange(videos)
        playback = torch.randint(0, 2 * len(config.views.speeds), (videos, 2))
        bank.insert(embeddings, source, playback)
    pretraining.steps = config.bank.warmup_steps
