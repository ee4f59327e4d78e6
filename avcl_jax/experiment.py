"""Objects of the library from the sections of a config, which are read here only."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from avcl_jax import weights
from avcl_jax.data.augment import PhotometricSpec, SpectralSpec
from avcl_jax.data.render_spec import CropSpec, RenderSpec
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import ViewSpec
from avcl_jax.errors import UserError
from avcl_jax.models import encoders
from avcl_jax.models.audio_visual import AudioVisualModel
from avcl_jax.models.video_resnet import VideoResNet
from avcl_jax.objectives.bank_sampling import ELIGIBLE_PER_POSITIVE_RANK, BankSampling
from avcl_jax.paths import absolute_path

if TYPE_CHECKING:
    from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing

# Task of pretraining, by which its runs are recognised.
PRETRAIN = "avcl_jax.training.loop:pretrain"

# Files and directories, which are used and recorded as absolute paths so that results can be read
# from any directory. Results depend on their contents, not on their locations.
PATH_KEYS = ("checkpoint", "encoder", "data.directory", "data.files", "data.audio_files")
_PATHS = (*PATH_KEYS, "init_from")

# Settings that configs of older versions lack, and the values that they stand for.
_ADDED = {"init_from": "", "init_optimizer": False, "init_bank": False}

# Settings, and sections of settings, with which a run may be resumed if it is told to; the shape of
# the state depends on the exceptions.
_CHANGEABLE = ("steps", "micro_batches", "optimizer.", "loss.", "bank.")
_FIXED = ("optimizer.name", "optimizer.ema_decay", "bank.size", "bank.dtype")

# Numbers by the last part of their key, and the smallest valid value of each.
_LEAST = {"seed": 0, "workers": 0, "weak": 0, "strong": 0, "folds": 2} | dict.fromkeys(
    (
        *("steps", "threads", "chunk", "part_records", "fsdp"),
        *("log_every", "checkpoint_every", "keep_checkpoints"),
        *("crop.image_size", "sample_rate_hz", "frames", "mels"),
        *("embedding_dim", "projection_hidden", "temporal_hidden", "iterations"),
        *("clips", "crops", "views", "train_views", "test_views", "pairs_per_video"),
        *("position_cells", "resamples", "answers", "medium"),
    ),
    1,
)
_LEAST |= dict.fromkeys(("learning_rate", "weight_decay", "clip_norm"), 0)
# Candidates for a regularisation strength.
_COSTS = ("costs", "classical_costs", "classical_linear_costs")
_FRACTIONS = ("gray_probability", "dropout", "momentum", "beta2")


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Checks numbers whose misuse would show only after compilation or training.

    Raises:
        UserError: naming the first one that is out of range or not finite.
    """
    for key, value in flatten(config.to_dict()).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} {value} must be finite")
        name = key.rpartition(".")[2]
        least = _LEAST.get(name, _LEAST.get(key))
        if least is not None and value < least:
            raise UserError(f"{key} {value} must be at least {least}")
        if name in _FRACTIONS and not 0 <= value <= 1:
            raise UserError(f"{key} {value} must be between 0 and 1")
        if name in _COSTS and not (value and min(value) > 0):
            raise UserError(f"{key} {value} must be positive numbers, one at least")


def check_inputs(config: ml_collections.ConfigDict) -> None:
    """Refuses a config without encoder, or whose records are not there, before slow steps.

    Raises:
        UserError: with the setting, or with the command or page that makes the records.
    """
    if "encoder" in config and config.encoder == "":
        raise UserError(
            "encoder is empty: set --config.encoder=PATH of a run or of an export, or its name"
        )
    if "data" not in config or "prepare" not in config.data:
        return
    data = config.data
    if not data.directory:
        raise UserError("data.directory is empty: set --config.data.directory=RECORDS")
    if not absolute_path(data.directory).exists():
        raise UserError(
            f"there are no records at {data.directory}: prepare them ({data.prepare}), or set "
            "--config.data.directory=RECORDS"
        )


def function_of(setting: str, name: str) -> Callable[..., Any]:
    """Imports the function that a setting names, `module:function`.

    Raises:
        UserError: if there is no such function, or its module needs a package that is not there.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except (ModuleNotFoundError, ValueError) as error:  # ValueError: the module has no name
        raise UserError(f"{setting} {name!r}: {error}; give MODULE:FUNCTION") from error
    if not callable(function):
        raise UserError(f"{setting} {name!r}: there is no such function; give MODULE:FUNCTION")
    return function


def with_absolute_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy of `config` whose paths are absolute; empty ones and names stay."""
    flat = flatten(config.to_dict())
    given = {key: flat[key] for key in _PATHS if flat.get(key)}
    absolute = copy.deepcopy(config)  # with references, which variants of an ablation move
    # The name of a shipped encoder is the same from every directory.
    whole = {
        k: weights.canonical(v) if k == "encoder" else str(absolute_path(v))
        for k, v in given.items()
    }
    absolute.update_from_flattened_dict(whole)
    return absolute


def render_spec(config: ml_collections.ConfigDict) -> RenderSpec:
    """Rendering of views: timing, crop, spectrogram, modalities."""
    views, crop, mel = config.views, config.crop, config.spectrogram
    if mel.where not in ("host", "device"):
        raise UserError(f"spectrogram.where {mel.where!r} must be 'host' or 'device'")
    if config.modalities not in ("audio_visual", "video", "audio"):
        raise UserError(
            f"modalities {config.modalities!r} must be 'audio_visual', 'video' or 'audio'"
        )
    log_mel = {name: value for name, value in mel.items() if name != "where"}
    return RenderSpec(
        views=ViewSpec(**{**views, "speeds": tuple(views.speeds)}),
        log_mel=LogMelSpec(clip_seconds=views.clip_seconds, **log_mel),
        crop=CropSpec(**crop),
        spectrogram_on_device=mel.where == "device",
        modalities=config.modalities,
    )


def augmentation(config: ml_collections.ConfigDict) -> tuple[PhotometricSpec, SpectralSpec]:
    """Strength of the augmentation of frames and of spectrograms."""
    return PhotometricSpec(**config.photometric), SpectralSpec(**config.spectral)


def compute_dtype(config: ml_collections.ConfigDict) -> jnp.dtype:
    """Type of the networks' computations."""
    if config.model.dtype not in ("float32", "bfloat16"):
        raise UserError(f"model.dtype {config.model.dtype!r} must be 'float32' or 'bfloat16'")
    return jnp.dtype(config.model.dtype)


def encoder(config: ml_collections.ConfigDict, modality: encoders.Modality) -> nn.Module:
    """The encoder of `config.model.video` or `config.model.audio`."""
    section = config.model[modality].to_dict()
    return encoders.create_encoder(
        modality,
        section["name"],
        encoders.config_settings(modality, section)
        | {"dtype": compute_dtype(config), "remat": config.execution.remat},
    )


def check_used(config: ml_collections.ConfigDict, settings: Iterable[str]) -> None:
    """Checks that `config` ignores none of `settings`, such as "model.video.resnet.widths".

    Raises:
        UserError: naming a setting of another encoder than that of `config`.
    """
    for setting in settings:
        for modality in encoders.BY_MODALITY:
            if setting.startswith(section := f"model.{modality}."):
                encoders.check_used(
                    modality, config.model[modality].name, setting.removeprefix(section)
                )


def audio_visual_model(
    config: ml_collections.ConfigDict, *, matrix_unit: int = 1
) -> AudioVisualModel:
    """The whole model that pretraining trains, for devices with this `convolution.matrix_unit`."""
    video = None if config.modalities == "audio" else encoder(config, "video")
    if isinstance(video, VideoResNet) and video.lowering == "auto":
        video = video.clone(matrix_unit=matrix_unit)
    return AudioVisualModel(
        video_encoder=video,
        audio_encoder=None if config.modalities == "video" else encoder(config, "audio"),
        embedding_dim=config.model.embedding_dim,
        projection_hidden=config.model.projection_hidden,
        temporal_hidden=config.model.temporal_hidden,
        speeds=tuple(config.views.speeds),
        dtype=compute_dtype(config),
    )


def preprocessings(
    config: ml_collections.ConfigDict,
) -> dict[str, VideoPreprocessing | AudioPreprocessing]:
    """Preprocessing of raw media for the video and the audio encoder."""
    # Its libraries of media are not needed to build and run the train step.
    from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing

    spec = render_spec(config)
    return {
        "video": VideoPreprocessing(
            num_frames=spec.views.num_frames,
            clip_seconds=spec.views.clip_seconds,
            image_size=spec.crop.image_size,
            mean=config.pixels.mean,
            std=config.pixels.std,
        ),
        "audio": AudioPreprocessing(spec.log_mel),
    }


def optimizer_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Settings of `training.optimizer.create_optimizer` without the learning rate."""
    names = ("name", "weight_decay", "momentum", "beta2", "clip_norm")
    return {name: config.optimizer[name] for name in names}


def bank_sampling(config: ml_collections.ConfigDict) -> BankSampling:
    """Settings of ranking and sampling the bank's rows.

    Raises:
        UserError: if rows are to be ranked across modalities and only one is trained, if no anchor
            could get positives, or if the bank has fewer rows than candidates.
    """
    section, space = config.bank, config.bank.space
    if config.modalities != "audio_visual":
        if space == "cross":
            raise UserError(
                f"bank.space 'cross' compares video with audio, and modalities="
                f"{config.modalities}: use 'same'"
            )
        space = "same"  # the agreement of one modality
    # A fraction of the bank, so that it means the same at every size.
    ranks = max(round(section.positive_window * section.size), section.num_positives)
    if section.num_positives and ELIGIBLE_PER_POSITIVE_RANK * ranks > section.size:
        raise UserError(
            f"bank.size {section.size} must be at least {ELIGIBLE_PER_POSITIVE_RANK} times the "
            f"{ranks} rows that positives are drawn from, or no anchor gets any: lower "
            "bank.positive_window or bank.num_positives"
        )
    if section.negative_candidates > section.size:
        raise UserError(
            f"bank.negative_candidates {section.negative_candidates} must be at most bank.size "
            f"{section.size}"
        )
    derived = {"space": space, "playbacks": 2 * len(config.views.speeds), "positive_ranks": ranks}
    names = {field.name for field in dataclasses.fields(BankSampling)} - derived.keys()
    return BankSampling(**derived, **{name: section[name] for name in names})


def bank_labels(config: ml_collections.ConfigDict) -> int:
    """Number of labels of a bank row; without health labels 1, which is unknown."""
    return max(len(config.bank.health_labels), 1)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as sorted JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ml_collections.ConfigDict:
    """Returns the config that `to_json` wrote.

    Raises:
        ValueError: if it is not JSON, or an older version wrote it.
    """
    return ml_collections.ConfigDict(_parse(text))


def _parse(text: str) -> dict[str, Any]:
    settings = json.loads(text)
    if "execution" not in settings:
        raise UserError(
            "an older version of avcl_jax wrote this config, with settings of other names: use "
            "that version, or choose another --workdir"
        )
    return settings


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def is_decisive(key: str) -> bool:
    """Returns whether the setting of this flattened key decides results.

    The section `execution`, names and `PATH_KEYS` do not: data and encoders are identified by
    their fingerprints. A run is resumed, and its results are accepted, with other values of these.
    """
    names = ("task", "name", "data.prepare", *PATH_KEYS)
    return not key.startswith("execution.") and key not in names


def may_change(key: str) -> bool:
    """Returns whether a run that is told to accept changes resumes with another value of this."""
    return key.startswith(_CHANGEABLE) and key not in _FIXED


def differences(old: str, new: str) -> list[str]:
    """Describes differences between two configs in JSON, one line per key: `key: old -> new`."""
    before, after = flatten(json.loads(old)), flatten(json.loads(new))
    before = {key: value for key, value in _ADDED.items() if key in after} | before
    pairs = {
        key: (before.get(key, "(absent)"), after.get(key, "(absent)"))
        for key in sorted(before.keys() | after.keys())
    }
    return [f"{key}: {one!r} -> {other!r}" for key, (one, other) in pairs.items() if one != other]


def decisive_differences(old: str, new: str) -> list[str]:
    """Returns those `differences` that decide results.

    Raises:
        UserError: if an older version wrote `old`.
    """
    _parse(old)
    return [line for line in differences(old, new) if is_decisive(line.split(":")[0])]
