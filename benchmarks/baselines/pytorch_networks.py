"""The demo's networks in PyTorch, as fast as a CPU runs them; for `pytorch_pretraining`.

The same function as `avcl_jax.models` with the settings of configs/pretrain.py:demo, and the same
names of submodules. PyTorch's running variance is the unbiased one; ours, like Flax's, is biased.
Memory is channels last, so that all forms below are views of one array. Clips stay folded: frames
in the batch for 1x3x3 convolutions, pixels in one axis for 3x1x1, both 2-D. Single 3-D convolutions
are about as fast, and the patches of a stem are faster as a strided convolution than as a product.
"""

from __future__ import annotations

import ml_collections
import torch
from torch import Tensor, nn

NUM_DIRECTIONS = 2
NUM_ORDERS = 3


def convolution(
    channels: int, features: int, kernel: tuple[int, int], stride: tuple[int, int]
) -> nn.Conv2d:
    """A convolution without bias, padded by (kernel - 1) // 2, for channels-last arrays."""
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    layer = nn.Conv2d(channels, features, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer.to(memory_format=torch.channels_last)


def stem(channels: int, features: int, patch: tuple[int, int]) -> nn.Conv2d:
    """A convolution of patches that do not overlap."""
    layer = nn.Conv2d(channels, features, patch, patch, bias=False)
    return layer.to(memory_format=torch.channels_last)


def last_norm(features: int) -> nn.BatchNorm2d:
    """The last normalisation of a residual block, whose scale begins at 0."""
    layer = nn.BatchNorm2d(features)
    nn.init.zeros_(layer.weight)
    return layer


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
        self.middle_norm = nn.BatchNorm2d(features)
        self.temporal = convolution(features, features, (3, 1), (stride, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [clips, channels, time, pixels]."""
        clips, time = x.shape[:2]
        x = self.middle_norm(self.spatial(frames_first(x))).relu()
        x = x.permute(0, 2, 3, 1).unflatten(0, (clips, time))
        return self.temporal(pixels_flat(x))


class VideoBlock(nn.Module):
    """Sum of two factorised convolutions and a shortcut, each normalised."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = FactorisedConvolution(channels, features, stride)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = FactorisedConvolution(features, features, 1)
        self.norm2 = last_norm(features)
        if channels != features or stride != 1:
            self.shortcut = convolution(channels, features, (1, 1), (1, 1))
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [clips, time, height, width, channels] to [.., features]."""
        skipped = x[:, :: self.stride, :: self.stride, :: self.stride]
        grid = skipped.shape[1:4]

        def unfold(y: Tensor) -> Tensor:
            return y.permute(0, 2, 3, 1).unflatten(2, grid[1:])

        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(unfold(y)))
        skipped = pixels_flat(skipped)
        if hasattr(self, "shortcut"):
            skipped = self.shortcut_norm(self.shortcut(skipped))
        return unfold((skipped + y).relu())


class VideoEncoder(nn.Module):
    """`VideoResNet` of kind "r2plus1d_plain" with the stem "patch4"."""

    def __init__(self, settings: ml_collections.ConfigDict) -> None:
        super().__init__()
        own = settings.resnet
        expected = ("resnet", "r2plus1d_plain", "patch4", "basic", "mean", True)
        given = (settings.name, own.factorisation, own.stem, own.block, own.pool)
        if (*given, settings.subtract_time_mean) != expected:
            raise ValueError(f"only {expected} is implemented in PyTorch, got {settings}")
        self.stem_patch = stem(3, own.widths[0], (4, 4))
        self.stem_norm = nn.BatchNorm2d(own.widths[0])
        self.blocks = _add_stages(self, VideoBlock, own.widths, own.depths)

    def forward(self, video: Tensor) -> Tensor:
        """Maps pixels [clips, time, height, width, 3] to features [clips, channels]."""
        clips, time = video.shape[:2]
        video = video - video.mean(dim=1, keepdim=True)
        x = self.stem_norm(self.stem_patch(frames_first(video))).relu()
        x = x.permute(0, 2, 3, 1).unflatten(0, (clips, time))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x.mean(dim=(1, 2, 3))


class AudioBlock(nn.Module):
    """Residual basic block of two 3x3 convolutions."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, features, (3, 3), (stride, stride))
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = convolution(features, features, (3, 3), (1, 1))
        self.norm2 = last_norm(features)
        if channels != features or stride != 1:
            self.shortcut = convolution(channels, features, (1, 1), (stride, stride))
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [clips, channels, frames, mels] to [.., features, ..]."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        if hasattr(self, "shortcut"):
            x = self.shortcut_norm(self.shortcut(x))
        return (x + y).relu()


class AudioEncoder(nn.Module):
    """`AudioResNet` with the stem "patch"."""

    def __init__(self, settings: ml_collections.ConfigDict) -> None:
        super().__init__()
        own = settings.resnet
        if (settings.name, own.stem) != ("resnet", "patch"):
            raise ValueError(f"only a resnet of stem 'patch' is implemented, got {settings}")
        self.stem_patch = stem(1, own.widths[0], tuple(own.patch))
        self.stem_norm = nn.BatchNorm2d(own.widths[0])
        self.blocks = _add_stages(self, AudioBlock, own.widths, own.depths)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Maps [clips, frames, mels] to features [clips, channels]."""
        x = self.stem_patch(spectrogram[..., None].permute(0, 3, 1, 2))
        x = self.stem_norm(x).relu()
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


def _add_stages(
    encoder: nn.Module, block: type[nn.Module], widths: tuple[int, ...], depths: tuple[int, ...]
) -> list[str]:
    """Adds the residual blocks of all stages under our names and returns the names in order."""
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
        self.norm = nn.BatchNorm1d(hidden)
        self.output = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps features [rows, channels] to outputs."""
        return self.output(self.norm(self.hidden(x)).relu())


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

    def forward(self, video: Tensor, spectrogram: Tensor) -> dict[str, Tensor]:
        """Embeddings and logits of two views of each video.

        Args:
            video: [videos, 2, time, height, width, 3].
            spectrogram: [videos, 2, frames, mels].
        """
        outputs: dict[str, Tensor] = {}
        pairs = {}
        for name, clips in (("video", video), ("audio", spectrogram)):
            features = getattr(self, f"{name}_encoder")(clips.flatten(0, 1))
            embeddings = getattr(self, f"{name}_projection")(features)
            embeddings = embeddings * (embeddings.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
            outputs[f"{name}_embeddings"] = embeddings.unflatten(0, (-1, 2))
            for task in ("speed", "direction"):
                logits = getattr(self, f"{task}_{name}_head")(features)
                outputs[f"{task}_{name}"] = logits.unflatten(0, (-1, 2))
            pairs[name] = features.unflatten(0, (-1, 2))
        outputs["order_vv"] = self.order_vv_head(pairs["video"].flatten(1))
        outputs["order_aa"] = self.order_aa_head(pairs["audio"].flatten(1))
        # (v1, a2) and (v2, a1).
        across = torch.cat([pairs["video"], pairs["audio"].flip(1)], dim=-1)
        outputs["order_va"] = self.order_va_head(across.flatten(0, 1)).unflatten(0, (-1, 2))
        return outputs
