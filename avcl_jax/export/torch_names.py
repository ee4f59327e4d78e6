"""Names of our encoders' layers in PyTorch code: one table per published code base.

A table is a list of rows (our module, their module, kind of layer). It covers every parameter and
statistic of the encoder, so what a table does not name is left over, and refused by name.

Sources: torchvision.models.video (0.28), facebookresearch/AVID-CMA, facebookresearch/GDT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from avcl_jax.models.audio_encoders import AudioConvNet, AudioResNet
from avcl_jax.models.encoders import Modality
from avcl_jax.models.s3d import MIXED, S3D
from avcl_jax.models.video_resnet import VideoResNet

Kind = Literal["conv", "norm"]
Row = tuple[str, str, Kind]

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


def torchvision_video_resnet(encoder: VideoResNet) -> list[Row]:
    """Rows of torchvision's `VideoResNet`, which GDT copied: r2plus1d_18, r3d_18, mc3_18, ..."""
    factorised = encoder.factorisation == "r2plus1d"
    if factorised:
        rows: list[Row] = [
            ("stem_spatial", "stem.0", "conv"),
            ("stem_middle_norm", "stem.1", "norm"),
            ("stem_temporal", "stem.3", "conv"),
            ("stem_norm", "stem.4", "norm"),
        ]
    else:
        rows = [("stem_conv", "stem.0", "conv"), ("stem_norm", "stem.1", "norm")]
    bottleneck = encoder.block == "bottleneck"
    for stage, block, ours in _blocks(encoder.depths):
        theirs = f"layer{stage}.{block}"
        if bottleneck:
            rows += [
                (f"{ours}/conv1", f"{theirs}.conv1.0", "conv"),
                (f"{ours}/norm1", f"{theirs}.conv1.1", "norm"),
                *_torchvision_conv(f"{ours}/conv2", f"{theirs}.conv2.0", factorised),
                (f"{ours}/norm2", f"{theirs}.conv2.1", "norm"),
                (f"{ours}/conv3", f"{theirs}.conv3.0", "conv"),
                (f"{ours}/norm3", f"{theirs}.conv3.1", "norm"),
            ]
        else:
            rows += [
                *_torchvision_conv(f"{ours}/conv1", f"{theirs}.conv1.0", factorised),
                (f"{ours}/norm1", f"{theirs}.conv1.1", "norm"),
                *_torchvision_conv(f"{ours}/conv2", f"{theirs}.conv2.0", factorised),
                (f"{ours}/norm2", f"{theirs}.conv2.1", "norm"),
            ]
        if block == 0 and (stage > 1 or bottleneck):
            rows += [
                (f"{ours}/shortcut", f"{theirs}.downsample.0", "conv"),
                (f"{ours}/shortcut_norm", f"{theirs}.downsample.1", "norm"),
            ]
    return rows


def _torchvision_conv(ours: str, theirs: str, factorised: bool) -> list[Row]:
    if not factorised:
        return [(f"{ours}/conv", theirs, "conv")]
    return [
        (f"{ours}/spatial", f"{theirs}.0", "conv"),
        (f"{ours}/middle_norm", f"{theirs}.1", "norm"),
        (f"{ours}/temporal", f"{theirs}.3", "conv"),
    ]


def torchvision_s3d(encoder: S3D) -> list[Row]:
    """Rows of torchvision's `S3D`; it has no gating."""
    rows = [
        *_separable("conv_1a", "features.0"),
        *_conv_norm("conv_2b", "features.2"),
        *_separable("conv_2c", "features.3"),
    ]
    # Their numbers in the sequence, in which the poolings before 4b and 5b count too.
    numbers = (5, 6, 8, 9, 10, 11, 12, 14, 15)
    for ours, number in zip(MIXED, numbers, strict=True):
        theirs = f"features.{number}"
        rows += [
            *_conv_norm(f"{ours}/branch0", f"{theirs}.branch0"),
            *_conv_norm(f"{ours}/branch1_reduce", f"{theirs}.branch1.0"),
            *_separable(f"{ours}/branch1", f"{theirs}.branch1.1"),
            *_conv_norm(f"{ours}/branch2_reduce", f"{theirs}.branch2.0"),
            *_separable(f"{ours}/branch2", f"{theirs}.branch2.1"),
            *_conv_norm(f"{ours}/branch3", f"{theirs}.branch3.1"),
        ]
    return rows


def _conv_norm(ours: str, theirs: str) -> list[Row]:
    return [(f"{ours}/conv", f"{theirs}.0", "conv"), (f"{ours}/norm", f"{theirs}.1", "norm")]


def _separable(ours: str, theirs: str) -> list[Row]:
    return [
        *_conv_norm(f"{ours}/spatial", f"{theirs}.0"),
        *_conv_norm(f"{ours}/temporal", f"{theirs}.1"),
    ]


def torchvision_resnet(encoder: AudioResNet) -> list[Row]:
    """Rows of torchvision's 2-D `ResNet` of basic blocks, which GDT uses on spectrograms."""
    rows: list[Row] = [("stem_conv", "conv1", "conv"), ("stem_norm", "bn1", "norm")]
    for stage, block, ours in _blocks(encoder.depths):
        theirs = f"layer{stage}.{block}"
        rows += [
            (f"{ours}/conv1", f"{theirs}.conv1", "conv"),
            (f"{ours}/norm1", f"{theirs}.bn1", "norm"),
            (f"{ours}/conv2", f"{theirs}.conv2", "conv"),
            (f"{ours}/norm2", f"{theirs}.bn2", "norm"),
        ]
        if block == 0 and stage > 1:
            rows += [
                (f"{ours}/shortcut", f"{theirs}.downsample.0", "conv"),
                (f"{ours}/shortcut_norm", f"{theirs}.downsample.1", "norm"),
            ]
    return rows


def avid_video(encoder: VideoResNet) -> list[Row]:
    """Rows of AVID-CMA's `R2Plus1D`."""
    rows: list[Row] = [("stem_conv", "conv1.0", "conv"), ("stem_norm", "conv1.1", "norm")]
    for stage, block, ours in _blocks(encoder.depths):
        theirs = f"conv{stage + 1}x.{block}"
        rows += [
            (f"{ours}/conv1/spatial", f"{theirs}.spt_conv1", "conv"),
            (f"{ours}/conv1/middle_norm", f"{theirs}.spt_bn1", "norm"),
            (f"{ours}/conv1/temporal", f"{theirs}.tmp_conv1", "conv"),
            (f"{ours}/norm1", f"{theirs}.tmp_bn1", "norm"),
            (f"{ours}/conv2/spatial", f"{theirs}.spt_conv2", "conv"),
            (f"{ours}/conv2/middle_norm", f"{theirs}.spt_bn2", "norm"),
            (f"{ours}/conv2/temporal", f"{theirs}.tmp_conv2", "conv"),
            (f"{ours}/norm2", f"{theirs}.out_bn", "norm"),
        ]
        if block == 0 and stage > 1:
            rows.append((f"{ours}/shortcut", f"{theirs}.res_conv", "conv"))
    return rows


def avid_audio(encoder: AudioConvNet) -> list[Row]:
    """Rows of AVID-CMA's `Conv2D`."""
    rows: list[Row] = [("stem_conv", "conv1.0", "conv"), ("stem_norm", "conv1.1", "norm")]
    for block in range(1, len(encoder.widths) + 1):
        for layer in (1, 2):
            rows += [
                (f"block{block}_{layer}_conv", f"block{block}.conv{layer}", "conv"),
                (f"block{block}_{layer}_norm", f"block{block}.bn{layer}", "norm"),
            ]
    return rows


def _blocks(depths: Any) -> Iterator[tuple[int, int, str]]:
    """Yields stage from 1, block from 0, and our name of the block."""
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            yield stage, block, f"stage{stage}_block{block + 1}"


@dataclasses.dataclass(frozen=True)
class CodeBase:
    """Names of the arrays in the checkpoints of one published code base.

    Attributes:
        tables: our name of the encoder → function that makes its rows.
        prefixes: modality → prefix of the names of its encoder.
        unused: prefixes of arrays that the encoder does not have: classifiers, projections, and the
            encoder of the other modality.
        mels_first: its spectrograms are [mels, frames] instead of [frames, mels].
    """

    tables: Mapping[str, Callable[[Any], list[Row]]]
    prefixes: Mapping[Modality, str]
    unused: Mapping[Modality, tuple[str, ...]]
    mels_first: bool = False


CODE_BASES: dict[str, CodeBase] = {
    "torchvision": CodeBase(
        tables={
            "r2plus1d_18": torchvision_video_resnet,
            "r2plus1d_34": torchvision_video_resnet,
            "r2plus1d_50": torchvision_video_resnet,
            "r3d_18": torchvision_video_resnet,
            "mc3_18": torchvision_video_resnet,
            "s3d": torchvision_s3d,
        },
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


@dataclasses.dataclass(frozen=True)
class NamedArray:
    """One array under both names.

    Attributes:
        ours: path in our variables, for instance "params/stem_norm/norm/scale".
        theirs: name in the state dict.
        kind: kind of the layer.
    """

    ours: str
    theirs: str
    kind: Kind


def named_arrays(
    code_base: CodeBase, name: str, modality: Modality, encoder: Any
) -> list[NamedArray]:
    """Every array of an encoder under both names."""
    prefix = code_base.prefixes[modality]
    return [
        NamedArray(f"{collection}/{ours}/{leaf}", f"{prefix}{theirs}.{their_leaf}", kind)
        for ours, theirs, kind in code_base.tables[name](encoder)
        for collection, leaf, their_leaf in _ARRAYS[kind]
    ]


def kernel_from_torch(kernel: np.ndarray, *, mels_first: bool) -> np.ndarray:
    """[out, in, *space] to [*space, in, out]; a 2-D kernel over mels and frames is turned."""
    if mels_first and kernel.ndim == 4:
        kernel = kernel.swapaxes(2, 3)
    return np.ascontiguousarray(np.moveaxis(kernel, (0, 1), (-1, -2)))


def kernel_to_torch(kernel: np.ndarray, *, mels_first: bool) -> np.ndarray:
    """The inverse of `kernel_from_torch`."""
    kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
    if mels_first and kernel.ndim == 4:
        kernel = kernel.swapaxes(2, 3)
    return np.ascontiguousarray(kernel)
