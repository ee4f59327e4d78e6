"""The demo's networks in PyTorch, as fast as a CPU runs them; for `pytorch_pretraining`.

The same function as `avcl_jax.models` for the settings of configs/pretrain.py:demo, with submodules
of the same names. Arrays lie channels last, so that all forms below are views of one memory. Clips
stay folded: frames in the batch for 1x3x3 convolutions, pixels in one axis for 3x1x1, both 2-D.
One layer at a time, 3-D convolutions are about as fast, and the patches of a stem are faster as a
strided convolution than as a product.
"""

from __future__ import annotations

import ml_collections
import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_DIRECTIONS = 2
NUM_ORDERS = 3


class BatchNorm(nn.Module):
    """Normalisation over the present rows: PyTorch's own where all are, as in the demo.

    Its running variance is the unbiased one, as PyTorch keeps it; ours, as Flax, the biased one.

    Args:
        channels: of axis 1.
        zero_scale: begin with a scale of 0.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, zero_scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels) if zero_scale else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalises [rows, channels, ...]; `mask` bool [clips], None if all are present.

        Rows are clips, or the frames of one clip after the other.
        """
        if mask is None:
            statistics = (self.running_mean, self.running_var)
            return functional.batch_norm(
                x, *statistics, self.weight, self.bias, training=True, momentum=0.1, eps=1e-5
            )
        shape = (-1, *(1,) * (x.ndim - 1))
        present = (mask | ~mask.any()).repeat_interleave(x.shape[0] // len(mask)).reshape(shape)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = present.sum() * x[0, 0].numel()
        channels = (1, -1, *(1,) * (x.ndim - 2))
        mean = torch.where(present, x, 0).sum(axes) / count
        centred = x - mean.reshape(channels)
        variance = torch.where(present, centred, 0).square().sum(axes) / count
        with torch.no_grad():
            weight = 0.1 * mask.any()
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(unbiased, weight)
        scale = self.weight * (variance + 1e-5).rsqrt()
        return centred * scale.reshape(channels) + self.bias.reshape(channels)


def convolution(
    channels: int, features: int, kernel: tuple[int, int], stride: tuple[int, int]
) -> nn.Conv2d:
    """A convolution without bias, padded by (kernel - 1) // 2, for arrays channels last."""
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    layer = nn.Conv2d(channels, features, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer.to(memory_format=torch.channels_last)


def frames_first(x: Tensor) -> Tensor:
    """[clips, time, height, width, channels] to [clips x time, channels, height, width]; a view."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def pixels_flat(x: Tensor) -> Tensor:
    """[clips, time, height, width, channels] to [clips, channels, time, pixels]; a view."""
    return x.flatten(2, 3).permute(0, 3, 1, 2)


class FactorisedConvolution(nn.Module):
    """1x3x3, normalisation, ReLU, 3x1x1, of [clips, time, height, width, channels]."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.spatial = convolution(channels, features, (3, 3), (stride, stride))
        self.middle_norm = BatchNorm(features)
        self.temporal = convolution(features, features, (3, 1), (stride, 1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns [clips, channels, time, pixels]."""
        clips, time = x.shape[:2]
        x = self.middle_norm(self.spatial(frames_first(x)), mask).relu()
        x = x.permute(0, 2, 3, 1).unflatten(0, (clips, time))
        return self.temporal(pixels_flat(x))


class VideoBlock(nn.Module):
    """Two factorised convolutions and a shortcut, each normalised, then added."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = FactorisedConvolution(channels, features, stride)
        self.norm1 = BatchNorm(features)
        self.conv2 = FactorisedConvolution(features, features, 1)
        self.norm2 = BatchNorm(features, zero_scale=True)
        if channels != features or stride != 1:
            self.shortcut = convolution(channels, features, (1, 1), (1, 1))
            self.shortcut_norm = BatchNorm(features)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [clips, time, height, width, channels] to [.., features]."""
        skipped = x[:, :: self.stride, :: self.stride, :: self.stride]
        grid = skipped.shape[1:4]

        def unfold(y: Tensor) -> Tensor:
            return y.permute(0, 2, 3, 1).unflatten(2, grid[1:])

        y = self.norm1(self.conv1(x, mask), mask).relu()
        y = self.norm2(self.conv2(unfold(y), mask), mask)
        skipped = pixels_flat(skipped)
        if hasattr(self, "shortcut"):
            skipped = self.shortcut_norm(self.shortcut(skipped), mask)
        return unfold((skipped + y).relu())


class VideoEncoder(nn.Module):
    """`VideoResNet` of kind "r2plus1d_plain" with the stem "patch4"."""

    def __init__(self, settings: ml_collections.ConfigDict) -> None:
        super().__init__()
        own = settings.resnet
        expected = ("resnet", "r2plus1d_plain", "patch4", "basic", "mean", True)
        given = (settings.name, own.factorisation, own.stem, own.block, own.pool)
        if (*given, settings.subtract_time_mean) != expected:
            raise ValueError(f"only {expected} is written in PyTorch, not {settings}")
        widths = own.widths
        self.stem_patch = nn.Conv2d(3, widths[0], 4, 4, bias=False)
        self.stem_patch.to(memory_format=torch.channels_last)
        self.stem_norm = BatchNorm(widths[0])
        self.blocks = _add_stages(self, VideoBlock, widths, own.depths)

    def forward(self, video: Tensor, mask: Tensor | None) -> Tensor:
        """Maps pixels [clips, time, height, width, 3] to features [clips, channels]."""
        clips, time = video.shape[:2]
        video = video - video.mean(dim=1, keepdim=True)
        x = self.stem_norm(self.stem_patch(frames_first(video)), mask).relu()
        x = x.permute(0, 2, 3, 1).unflatten(0, (clips, time))
        for name in self.blocks:
            x = getattr(self, name)(x, mask)
        return x.mean(dim=(1, 2, 3))


class AudioBlock(nn.Module):
    """Residual basic block of two 3x3 convolutions."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = convolution(channels, features, (3, 3), (stride, stride))
        self.norm1 = BatchNorm(features)
        self.conv2 = convolution(features, features, (3, 3), (1, 1))
        self.norm2 = BatchNorm(features, zero_scale=True)
        if channels != features or stride != 1:
            self.shortcut = convolution(channels, features, (1, 1), (stride, stride))
            self.shortcut_norm = BatchNorm(features)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [clips, channels, frames, mels] to [.., features, ..]."""
        y = self.norm1(self.conv1(x), mask).relu()
        y = self.norm2(self.conv2(y), mask)
        if hasattr(self, "shortcut"):
            x = self.shortcut_norm(self.shortcut(x), mask)
        return (x + y).relu()


class AudioEncoder(nn.Module):
    """`AudioResNet` with the stem "patch"."""

    def __init__(self, settings: ml_collections.ConfigDict) -> None:
        super().__init__()
        own = settings.resnet
        if (settings.name, own.stem) != ("resnet", "patch"):
            raise ValueError(f"only a resnet of stem 'patch' is written in PyTorch, not {settings}")
        widths, patch = own.widths, tuple(own.patch)
        self.stem_patch = nn.Conv2d(1, widths[0], patch, patch, bias=False)
        self.stem_patch.to(memory_format=torch.channels_last)
        self.stem_norm = BatchNorm(widths[0])
        self.blocks = _add_stages(self, AudioBlock, widths, own.depths)

    def forward(self, spectrogram: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [clips, frames, mels] to features [clips, channels]."""
        x = self.stem_patch(spectrogram[..., None].permute(0, 3, 1, 2))
        x = self.stem_norm(x, mask).relu()
        for name in self.blocks:
            x = getattr(self, name)(x, mask)
        return x.mean(dim=(2, 3))


def _add_stages(
    encoder: nn.Module, block: type[nn.Module], widths: tuple[int, ...], depths: tuple[int, ...]
) -> list[str]:
    """Adds the residual blocks of all stages under our names, and returns these in order."""
    names = []
    channels = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for number in range(depth):
            stride = 2 if stage > 0 and number == 0 else 1
            names.append(f"stage{stage + 1}_block{number + 1}")
            encoder.add_module(names[-1], block(channels, width, stride))
            channels = width
    return names


class Head(nn.Module):
    """Dense, normalisation, ReLU, Dense."""

    def __init__(self, channels: int, hidden: int, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden, bias=False)
        self.norm = BatchNorm(hidden)
        self.output = nn.Linear(hidden, features)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps features [rows, channels] to outputs."""
        return self.output(self.norm(self.hidden(x), mask).relu())


class AudioVisualNetwork(nn.Module):
    """Both encoders and all heads, `AudioVisualModel` of a config of both modalities."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        super().__init__()
        model = config.model
        encoders = {"video": VideoEncoder(model.video), "audio": AudioEncoder(model.audio)}
        channels = {name: model[name].resnet.widths[-1] for name in encoders}
        for name, encoder in encoders.items():
            self.add_module(f"{name}_encoder", encoder)
            for head, hidden, features in (
                (f"{name}_projection", model.projection_hidden, model.embedding_dim),
                (f"speed_{name}_head", model.temporal_hidden, len(config.views.speeds)),
                (f"direction_{name}_head", model.temporal_hidden, NUM_DIRECTIONS),
            ):
                self.add_module(head, Head(channels[name], hidden, features))
        for first, second in (("video", "video"), ("audio", "audio"), ("video", "audio")):
            both = channels[first] + channels[second]
            head = f"order_{first[0]}{second[0]}_head"
            self.add_module(head, Head(both, model.temporal_hidden, NUM_ORDERS))

    def forward(
        self, video: Tensor, spectrogram: Tensor, masks: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Embeddings and logits of two views of each video.

        Args:
            video: [videos, 2, time, height, width, 3].
            spectrogram: [videos, 2, frames, mels].
            masks: `video` and `audio`, bool [videos], which of them there are; None for all.
        """
        inputs = {"video": video, "audio": spectrogram}
        views: dict[str, Tensor | None] = dict.fromkeys((*inputs, "both"))
        if masks is not None:
            masks = {**masks, "both": masks["video"] & masks["audio"]}
            views = {name: mask.repeat_interleave(2) for name, mask in masks.items()}
        outputs: dict[str, Tensor] = {}
        features = {}
        for name, clips in inputs.items():
            mask = views[name]
            found = getattr(self, f"{name}_encoder")(clips.flatten(0, 1), mask)
            embeddings = getattr(self, f"{name}_projection")(found, mask)
            embeddings = embeddings * (embeddings.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
            outputs[f"{name}_embeddings"] = embeddings.unflatten(0, (-1, 2))
            for task in ("speed", "direction"):
                logits = getattr(self, f"{task}_{name}_head")(found, mask)
                outputs[f"{task}_{name}"] = logits.unflatten(0, (-1, 2))
            features[name] = found.unflatten(0, (-1, 2))
        for term, name in (("order_vv", "video"), ("order_aa", "audio")):
            mask = None if masks is None else masks[name]
            outputs[term] = getattr(self, f"{term}_head")(features[name].flatten(1), mask)
        # (v1, a2) and (v2, a1).
        pairs = torch.cat([features["video"], features["audio"].flip(1)], dim=-1)
        logits = self.order_va_head(pairs.flatten(0, 1), views["both"])
        outputs["order_va"] = logits.unflatten(0, (-1, 2))
        return outputs
