"""Names of our encoders' layers in PyTorch code: one table per published code base.

A table maps our layers to theirs. It covers every parameter and statistic of the encoder, so what a
table does not name is left over, and refused by name.

Sources: torchvision.models.video (0.28), facebookresearch/AVID-CMA, facebookresearch/GDT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from avcl_jax.models.audio_encoders import AudioConvNet, AudioResNet
from avcl_jax.models.encoders import Modality
from avcl_jax.models.s3d import MIXED, S3D
from avcl_jax.models.video_resnet import VideoResNet

Kind = Literal["conv", "norm"]

# (ours below "params" or "batch_stats", PyTorch's) of the arrays of one layer.
_ARRAYS: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "conv": (("params", "kernel", "weight"),),
    "norm": (
        ("params", "norm/scale", "weight"),
        ("params", "norm/bias", "bias"),
        ("batch_stats", "norm/mean", "running_mean"),
        ("batch_stats", "norm/var", "running_var"),
    ),
}
# Counts batches; used by PyTorch only where a normalisation has no momentum.
UNUSED_SUFFIX = ".num_batches_tracked"


def _kind(ours: str) -> Kind:
    """Kind of a layer, which our names tell."""
    return "norm" if "norm" in ours.rpartition("/")[2] else "conv"


def _within(ours: str, theirs: str, layers: Mapping[str, str]) -> dict[str, str]:
    """Layers of a module under the names of the whole network."""
    return {f"{ours}/{name}": f"{theirs}.{other}" for name, other in layers.items()}


# Of a convolution, normalised; of a factorised one, with its normalisation between.
_CONV_NORM = {"conv": "0", "norm": "1"}
_FACTORISED = {"spatial": "0", "middle_norm": "1", "temporal": "3"}


def torchvision_video_resnet(encoder: VideoResNet) -> dict[str, str]:
    """Names of torchvision's `VideoResNet`, which GDT copied: r2plus1d_18, r3d_18, mc3_18, ..."""
    if encoder.factorisation == "r2plus1d":
        stem = {"spatial": "0", "middle_norm": "1", "temporal": "3", "norm": "4"}
    else:
        stem = _CONV_NORM
    table = {f"stem_{ours}": f"stem.{theirs}" for ours, theirs in stem.items()}
    for stage, block, ours in _blocks(encoder.depths):
        theirs = f"layer{stage}.{block}"
        bottleneck = encoder.block == "bottleneck"
        for conv in ("conv1", "conv2", "conv3") if bottleneck else ("conv1", "conv2"):
            name, other = f"{ours}/{conv}", f"{theirs}.{conv}.0"
            if bottleneck and conv != "conv2":
                table[name] = other
            elif encoder.factorisation == "r2plus1d":
                table |= _within(name, other, _FACTORISED)
            else:
                table[f"{name}/conv"] = other
            table[f"{ours}/norm{conv[-1]}"] = f"{theirs}.{conv}.1"
        if block == 0 and (stage > 1 or bottleneck):
            shortcut = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
            table |= _within(ours, theirs, shortcut)
    return table


def torchvision_s3d(encoder: S3D) -> dict[str, str]:
    """Names of torchvision's `S3D`; it has no gating."""

    def separable(ours: str, theirs: str) -> dict[str, str]:
        return _within(f"{ours}/spatial", f"{theirs}.0", _CONV_NORM) | _within(
            f"{ours}/temporal", f"{theirs}.1", _CONV_NORM
        )

    table = separable("conv_1a", "features.0")
    table |= _within("conv_2b", "features.2", _CONV_NORM)
    table |= separable("conv_2c", "features.3")
    # Their numbers in the sequence, in which the poolings before 4b and 5b count too.
    numbers = (5, 6, 8, 9, 10, 11, 12, 14, 15)
    for ours, number in zip(MIXED, numbers, strict=True):
        theirs = f"features.{number}"
        table |= _within(f"{ours}/branch0", f"{theirs}.branch0", _CONV_NORM)
        for branch in ("branch1", "branch2"):
            table |= _within(f"{ours}/{branch}_reduce", f"{theirs}.{branch}.0", _CONV_NORM)
            table |= separable(f"{ours}/{branch}", f"{theirs}.{branch}.1")
        table |= _within(f"{ours}/branch3", f"{theirs}.branch3.1", _CONV_NORM)
    return table


def torchvision_resnet(encoder: AudioResNet) -> dict[str, str]:
    """Names of torchvision's 2-D `ResNet` of basic blocks, which GDT uses on spectrograms."""
    table = {"stem_conv": "conv1", "stem_norm": "bn1"}
    for stage, block, ours in _blocks(encoder.depths):
        layers = {"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2"}
        if block == 0 and stage > 1:
            layers |= {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
        table |= _within(ours, f"layer{stage}.{block}", layers)
    return table


def avid_video(encoder: VideoResNet) -> dict[str, str]:
    """Names of AVID-CMA's `R2Plus1D`."""
    table = {"stem_conv": "conv1.0", "stem_norm": "conv1.1"}
    for stage, block, ours in _blocks(encoder.depths):
        layers = {
            "conv1/spatial": "spt_conv1",
            "conv1/middle_norm": "spt_bn1",
            "conv1/temporal": "tmp_conv1",
            "norm1": "tmp_bn1",
            "conv2/spatial": "spt_conv2",
            "conv2/middle_norm": "spt_bn2",
            "conv2/temporal": "tmp_conv2",
            "norm2": "out_bn",
        }
        if block == 0 and stage > 1:
            layers["shortcut"] = "res_conv"
        table |= _within(ours, f"conv{stage + 1}x.{block}", layers)
    return table


def avid_audio(encoder: AudioConvNet) -> dict[str, str]:
    """Names of AVID-CMA's `Conv2D`."""
    table = {"stem_conv": "conv1.0", "stem_norm": "conv1.1"}
    for block in range(1, len(encoder.widths) + 1):
        for layer in (1, 2):
            table[f"block{block}_{layer}_conv"] = f"block{block}.conv{layer}"
            table[f"block{block}_{layer}_norm"] = f"block{block}.bn{layer}"
    return table


def _blocks(depths: Any) -> Iterator[tuple[int, int, str]]:
    """Yields stage from 1, block from 0, and our name of the block."""
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            yield stage, block, f"stage{stage}_block{block + 1}"


@dataclasses.dataclass(frozen=True)
class CodeBase:
    """Names of the arrays in the checkpoints of one published code base.

    Attributes:
        tables: our name of the encoder → function that makes its table.
        prefixes: modality → prefix of the names of its encoder.
        unused: prefixes of arrays that the encoder does not have: classifiers, projections, and the
            encoder of the other modality.
        mels_first: its spectrograms are [mels, frames] instead of [frames, mels].
    """

    tables: Mapping[str, Callable[[Any], dict[str, str]]]
    prefixes: Mapping[Modality, str]
    unused: Mapping[Modality, tuple[str, ...]]
    mels_first: bool = False


CODE_BASES: dict[str, CodeBase] = {
    "torchvision": CodeBase(
        tables=dict.fromkeys(
            ("r2plus1d_18", "r2plus1d_34", "r2plus1d_50", "r3d_18", "mc3_18"),
            torchvision_video_resnet,
        )
        | {"s3d": torchvision_s3d},
        prefixes={"video": ""},
        unused={"video": ("fc.", "classifier.")},
    ),
    "avid": CodeBase(
        tables={"r2plus1d_18_avid": avid_video, "conv_10": avid_audio},
        prefixes={"video": "video_model.", "audio": "audio_model."},
        unused={
            "video": ("audio_model.", "video_proj.", "audio_proj."),
            "audio": ("video_model.", "video_proj.", "audio_proj."),
        },
    ),
    "gdt": CodeBase(
        tables={
            "r2plus1d_18": torchvision_video_resnet,
            "r2plus1d_34": torchvision_video_resnet,
            "resnet_9": torchvision_resnet,
            "resnet_18": torchvision_resnet,
        },
        prefixes={"video": "video_network.base.", "audio": "audio_network.base."},
        unused={
            "video": ("audio_network.", "text_network.", "mlp_v.", "mlp_a.", "mlp_t."),
            # Its resnet9 keeps ImageNet's classifier, 513,000 parameters that no feature sees.
            "audio": ("audio_network.base.fc.", "video_network.", "mlp_v.", "mlp_a."),
        },
        mels_first=True,
    ),
}


class NamedArray(NamedTuple):
    """One array under both names."""

    ours: str  # path in our variables, for instance "params/stem_norm/norm/scale"
    theirs: str  # name in the state dict
    kind: Kind


def named_arrays(
    code_base: CodeBase, name: str, modality: Modality, encoder: Any
) -> list[NamedArray]:
    """Every array of an encoder under both names."""
    prefix = code_base.prefixes[modality]
    return [
        NamedArray(f"{collection}/{ours}/{leaf}", f"{prefix}{theirs}.{their_leaf}", _kind(ours))
        for ours, theirs in code_base.tables[name](encoder).items()
        for collection, leaf, their_leaf in _ARRAYS[_kind(ours)]
    ]


def kernel_from_torch(kernel: np.ndarray, *, mels_first: bool) -> np.ndarray:
    """[out, in, *space] to [*space, in, out]; a 2-D kernel over mels and frames is turned."""
    if mels_first and kernel.ndim == 4:
        kernel = kernel.swapaxes(2, 3)
    return np.ascontiguousarray(np.moveaxis(kernel, (0, 1), (-1, -2)))


def kernel_to_torch(kernel: np.ndarray, *, mels_first: bool) -> np.ndarray:
    """The inverse of `kernel_from_torch`."""
    kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
    turned = mels_first and kernel.ndim == 4
    return np.ascontiguousarray(kernel.swapaxes(2, 3) if turned else kernel)
