"""Encoders by name: the general classes, and the published networks that papers compare.

A general name ("resnet") takes all its settings; a published one ("r2plus1d_18") fixes those that
make it what was published, and refuses others for them: a network under a published name is that
network. In a config, settings that a published name may fix are in a section for each general name,
which published names ignore. docs/encoders.md lists sizes and sources.

A new class of encoders is a file with a subclass of `layers.EncoderModule` that keeps the contract
of `EncoderContract`, and a row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn
from jaxtyping import Array, Bool

from avcl_jax.errors import UserError
from avcl_jax.models.audio_encoders import AudioConvNet, AudioResNet
from avcl_jax.models.layers import Remat
from avcl_jax.models.s3d import S3D
from avcl_jax.models.transformers import AudioTransformer, VideoTransformer
from avcl_jax.models.video_resnet import VideoResNet

Modality = Literal["video", "audio"]


@runtime_checkable
class EncoderContract(Protocol):
    """Contract of an encoder class, which training, fine-tuning and export rely on.

    It is a Linen module. Its fields are its settings, by name in a config and in the config.json of
    an export: numbers, strings, booleans and tuples of them. Names of parameters do not depend on
    settings that change only how it is computed (`remat`, `dtype`, `lowering`).

    Attributes:
        dtype: compute dtype; parameters, statistics and features are float32.
        remat: parts whose activations the backward pass computes again, see `layers.recomputed`.
    """

    dtype: Any
    remat: Remat

    def __call__(
        self, clips: Array, /, *, train: bool, mask: Bool[Array, " batch"] | None = None
    ) -> dict[str, Array]:
        """Encodes a batch of clips.

        Args:
            clips: video [batch, time, height, width, 3] of about zero mean and unit scale, or in
                [0, 1] with `channel_mean`; or log-mel spectrograms [batch, frames, mels] likewise.
                A video encoder subtracts the mean frame first if `subtract_time_mean`.
            train: normalise by the statistics of the batch and update the running ones, unless
                `freeze_norm`.
            mask: rows whose modality is present; the others do not enter the statistics, and no row
                changes the output of another.

        Returns:
            `map` [batch, *grid, channels], and `features` float32 [batch, channels], pooled over
            its grid.
        """


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An encoder that has a name.

    Attributes:
        encoder: its class.
        fixed: settings that belong to the name.
    """

    encoder: Callable[..., EncoderContract]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_WIDTHS = (64, 128, 256, 512)
# PyTorch's defaults, with which torchvision, GDT and AVID-CMA trained: momentum 0.1, epsilon 1e-5.
_TORCH_NORM = {"norm_momentum": 0.9, "norm_epsilon": 1e-5}
_VIDEO_18 = {"widths": _WIDTHS, "depths": (2, 2, 2, 2), "block": "basic", "pool": "mean"}
_R2PLUS1D = {"factorisation": "r2plus1d", "stem": "r2plus1d", **_TORCH_NORM}
# torchvision's s3d: momentum 0.001, epsilon 0.001.
_S3D = {"width": 1.0, "norm_momentum": 0.999, "norm_epsilon": 1e-3}
_VIT_S = {"width": 384, "depth": 12, "heads": 6}
_VIT_B = {"width": 768, "depth": 12, "heads": 12}
_TUBELET = (2, 16, 16)
_DEPTHS_34 = (3, 4, 6, 3)

VIDEO: dict[str, Architecture] = {
    "resnet": Architecture(VideoResNet),
    "r2plus1d_18": Architecture(VideoResNet, {**_VIDEO_18, **_R2PLUS1D}),
    "r2plus1d_34": Architecture(VideoResNet, {**_VIDEO_18, **_R2PLUS1D, "depths": _DEPTHS_34}),
    "r2plus1d_50": Architecture(
        VideoResNet, {**_VIDEO_18, **_R2PLUS1D, "depths": _DEPTHS_34, "block": "bottleneck"}
    ),
    "r3d_18": Architecture(
        VideoResNet, {**_VIDEO_18, **_TORCH_NORM, "factorisation": "r3d", "stem": "r3d"}
    ),
    "mc3_18": Architecture(
        VideoResNet, {**_VIDEO_18, **_TORCH_NORM, "factorisation": "mc3", "stem": "r3d"}
    ),
    "r2plus1d_18_avid": Architecture(
        VideoResNet,
        {
            **_VIDEO_18,
            **_TORCH_NORM,
            "factorisation": "r2plus1d_plain",
            "stem": "r3d_pool",
            "block": "norm_after_sum",
            "pool": "max",
        },
    ),
    "inception": Architecture(S3D),
    "s3d": Architecture(S3D, {**_S3D, "gating": False}),
    "s3dg": Architecture(S3D, {**_S3D, "gating": True}),
    "transformer": Architecture(VideoTransformer),
    "vivit_s": Architecture(
        VideoTransformer, {**_VIT_S, "tubelet": _TUBELET, "attention": "factorised"}
    ),
    "vivit_b": Architecture(
        VideoTransformer, {**_VIT_B, "tubelet": _TUBELET, "attention": "factorised"}
    ),
    "vivit_b_joint": Architecture(
        VideoTransformer, {**_VIT_B, "tubelet": _TUBELET, "attention": "joint"}
    ),
}

_AUDIO_RESNET = {"widths": _WIDTHS, "stem": "resnet", **_TORCH_NORM}

AUDIO: dict[str, Architecture] = {
    "resnet": Architecture(AudioResNet),
    "resnet_9": Architecture(AudioResNet, {**_AUDIO_RESNET, "depths": (1, 1, 1, 1)}),
    "resnet_18": Architecture(AudioResNet, {**_AUDIO_RESNET, "depths": (2, 2, 2, 2)}),
    "convnet": Architecture(AudioConvNet),
    "conv_10": Architecture(AudioConvNet, {"widths": _WIDTHS, "pool": "max", **_TORCH_NORM}),
    "transformer": Architecture(AudioTransformer),
    "ast_s": Architecture(AudioTransformer, {**_VIT_S, "patch": (16, 16)}),
    "ast_b": Architecture(AudioTransformer, {**_VIT_B, "patch": (16, 16)}),
}

BY_MODALITY: dict[Modality, dict[str, Architecture]] = {"video": VIDEO, "audio": AUDIO}

# By which exported encoders name their class.
CLASSES: dict[str, Any] = {
    architecture.encoder.__name__: architecture.encoder
    for architectures in BY_MODALITY.values()
    for architecture in architectures.values()
}


def create_encoder(modality: Modality, name: str, settings: Mapping[str, Any]) -> nn.Module:
    """Makes the encoder of that name.

    Args:
        modality: "video" or "audio".
        name: a key of `VIDEO` or `AUDIO`.
        settings: the other fields of its class; lists become tuples.

    Raises:
        UserError: naming a setting that the encoder does not have, that its name fixes, or that is
            missing; or that the name is unknown.
    """
    known = BY_MODALITY[modality]
    architecture = _architecture(modality, name)
    fields = _fields(architecture)
    where = f"the {modality} encoder {name!r}"
    for key in settings:
        if key not in fields:
            raise UserError(f"{where} has no setting {key!r}: it has {', '.join(sorted(fields))}")
        if key in architecture.fixed:
            raise UserError(
                f"{where} fixes {key} to {architecture.fixed[key]!r}: leave {key} out, or take a "
                f"general encoder ({', '.join(n for n, a in known.items() if not a.fixed)})"
            )
    given = {**architecture.fixed, **settings}
    missing = [
        key
        for key, field in fields.items()
        if key not in given and field.default is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} needs the setting {missing[0]!r}")
    encoder: Any = architecture.encoder
    return encoder(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def config_settings(modality: Modality, section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an encoder takes from its section of a config.

    Args:
        modality: "video" or "audio".
        section: `name`, settings for all encoders of the modality that have them, and a section
            of settings for each general name.

    Raises:
        UserError: naming a setting that no encoder takes from there.
    """
    known, name = BY_MODALITY[modality], section["name"]
    fields = _fields(_architecture(modality, name))
    fixed = {key for architecture in known.values() for key in architecture.fixed}
    shared = {key for architecture in known.values() for key in _fields(architecture)} - fixed
    given = {key: value for key, value in section.items() if key != "name" and key not in known}
    for key in given:
        if key not in shared:
            raise UserError(
                f"model.{modality} has no setting {key!r}: it has {', '.join(sorted(shared))} and "
                f"a section for each of {', '.join(n for n, a in known.items() if not a.fixed)}"
            )
    own = section.get(name, {})
    return {key: value for key, value in given.items() if key in fields} | own


def check_used(modality: Modality, name: str, setting: str) -> None:
    """Checks that an encoder takes a setting from its section of a config.

    Args:
        modality: "video" or "audio".
        name: a key of `VIDEO` or `AUDIO`.
        setting: its name in that section, such as "lowering" or "resnet.widths".

    Raises:
        UserError: if the encoder ignores it.
    """
    where, (owner, _, _) = f"model.{modality}", setting.partition(".")
    fields = _fields(_architecture(modality, name))
    if owner == setting and setting not in ("name", *fields):
        raise UserError(f"{where}.{setting}: {where}.name={name} has no such setting: leave it out")
    if owner not in (setting, name):
        raise UserError(
            f"{where}.{setting} is a setting of {where}.name={owner}, and {where}.name={name} "
            "ignores it: leave one of them out"
        )


def _architecture(modality: Modality, name: str) -> Architecture:
    known = BY_MODALITY[modality]
    if name not in known:
        raise UserError(f"unknown {modality} encoder {name!r}: use one of {', '.join(known)}")
    return known[name]


def _fields(architecture: Architecture) -> dict[str, dataclasses.Field[Any]]:
    encoder: Any = architecture.encoder
    fields = dataclasses.fields(encoder)
    return {field.name: field for field in fields if field.name not in ("parent", "name")}


def published_name(encoder: nn.Module) -> str | None:
    """The published name of an encoder, or None if its settings are those of no published one."""
    for architectures in BY_MODALITY.values():
        for name, architecture in architectures.items():
            if (
                architecture.fixed
                and type(encoder) is architecture.encoder
                and all(getattr(encoder, key) == value for key, value in architecture.fixed.items())
            ):
                return name
    return None
