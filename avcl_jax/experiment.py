"""From a config to the objects that the library works with: the one place that reads its sections.

Every function takes the sections of a config by attribute, so that a key that is missing fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from avcl_jax.data.augment import PhotometricSpec, SpectralSpec
from avcl_jax.data.images import CropSpec
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import ViewSpec
from avcl_jax.errors import UserError
from avcl_jax.models import encoders
from avcl_jax.models.audio_visual import AudioVisualModel
from avcl_jax.objectives.bank_sampling import ELIGIBLE_PER_POSITIVE_RANK, BankSampling
from avcl_jax.paths import absolute_path

# Files and directories, which are used and recorded as absolute paths so that results can be read
# from any directory. Results depend on their contents, not on their locations.
PATH_KEYS = ("checkpoint", "encoder", "data.directory", "data.files", "data.sounds")

# Settings that change how and where a run is executed and watched, not what it computes: a run is
# resumed, and its results are accepted, with others. Data and encoders are identified by their
# fingerprints, not by where they are.
EXECUTION_KEYS = frozenset(
    {
        "name",
        *PATH_KEYS,
        "data.workers",
        "data.threads",
        "data.prefetch",
        "data.max_bad_records",
        "evaluation.chunk",
        "evaluation.threads",
        "evaluation.part_records",
        "features.chunk",
        "features.part_records",
        "test.chunk",
        "threads",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "mesh.fsdp",
        "model.remat",
        "compilation_cache",
    }
)

# Counts, and the smallest valid value of each.
_LEAST = {
    "seed": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "threads": 1,
    "mesh.fsdp": 1,
    "crop.image_size": 1,
    "spectrogram.sample_rate_hz": 1,
    "spectrogram.frames": 1,
    "spectrogram.mels": 1,
    "model.embedding_dim": 1,
    "model.projection_hidden": 1,
    "model.temporal_hidden": 1,
    "data.workers": 0,
    "data.threads": 1,
    "data.prefetch": 1,
    "evaluation.chunk": 1,
    "evaluation.threads": 1,
    "evaluation.part_records": 1,
    "features.chunk": 1,
    "features.part_records": 1,
    "features.views_per_speed": 1,
    "test.chunk": 1,
    "test.clips": 1,
    "test.crops": 1,
    "probe.folds": 2,
    "probe.iterations": 1,
    "evaluation.views_per_speed": 1,
    "evaluation.pairs_per_video": 1,
    "evaluation.position_cells": 1,
    "evaluation.supervised.video.views": 1,
    "evaluation.supervised.audio.views": 1,
    "evaluation.null.train_views": 1,
    "evaluation.null.test_views": 1,
    "evaluation.probe.folds": 2,
    "evaluation.probe.iterations": 1,
    "bootstrap.resamples": 1,
    "answers": 1,
    "queries.weak": 0,
    "queries.medium": 1,
    "queries.strong": 0,
}
# Candidates for a regularisation strength.
_COSTS = (
    "probe.costs",
    "evaluation.probe.costs",
    "baselines.classical_costs",
    "baselines.classical_linear_costs",
)


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Checks numbers whose misuse would show only after compilation or training.

    Raises:
        UserError: naming the first one that is too small.
    """
    flat = flatten(config.to_dict())
    for key, least in _LEAST.items():
        if key in flat and flat[key] < least:
            raise UserError(f"{key} {flat[key]} must be at least {least}")
    for key in _COSTS:
        if key in flat and not (flat[key] and min(flat[key]) > 0):
            raise UserError(f"{key} {flat[key]} must be positive numbers, one at least")


def with_absolute_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy of `config` whose `PATH_KEYS` are absolute; an empty one stays empty."""
    flat = flatten(config.to_dict())
    given = {key: flat[key] for key in PATH_KEYS if flat.get(key)}
    absolute = config.copy_and_resolve_references()
    absolute.update_from_flattened_dict({k: str(absolute_path(v)) for k, v in given.items()})
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
    return RenderSpec(
        views=ViewSpec(
            num_frames=views.num_frames,
            clip_seconds=views.clip_seconds,
            speeds=tuple(views.speeds),
            audio_transform=views.audio_transform,
        ),
        log_mel=LogMelSpec(
            sample_rate_hz=mel.sample_rate_hz,
            frames=mel.frames,
            mels=mel.mels,
            clip_seconds=views.clip_seconds,
            min_hz=mel.min_hz,
            max_hz=mel.max_hz,
            floor=mel.floor,
            mean=mel.mean,
            std=mel.std,
        ),
        crop=CropSpec(
            image_size=crop.image_size,
            min_area=crop.min_area,
            flip=crop.flip,
            quarter_turns=crop.quarter_turns,
        ),
        spectrogram_on_device=mel.where == "device",
        modalities=config.modalities,
    )


def photometric_spec(config: ml_collections.ConfigDict) -> PhotometricSpec:
    """Strength of the photometric augmentation."""
    section = config.photometric
    return PhotometricSpec(
        brightness=section.brightness,
        contrast=section.contrast,
        saturation=section.saturation,
        hue=section.hue,
        gray_probability=section.gray_probability,
        per_frame=section.per_frame,
    )


def spectral_spec(config: ml_collections.ConfigDict) -> SpectralSpec:
    """Strength of the augmentation of spectrograms."""
    section = config.spectral
    return SpectralSpec(
        equalizer=section.equalizer,
        equalizer_knots=section.equalizer_knots,
        mask_mels=section.mask_mels,
        noise=section.noise,
    )


def video_encoder(config: ml_collections.ConfigDict) -> nn.Module:
    """The video encoder of `config.model.video`."""
    return _encoder("video", config)


def audio_encoder(config: ml_collections.ConfigDict) -> nn.Module:
    """The audio encoder of `config.model.audio`."""
    return _encoder("audio", config)


def _encoder(modality: encoders.Modality, config: ml_collections.ConfigDict) -> nn.Module:
    section = config.model[modality].to_dict()
    return encoders.create_encoder(
        modality,
        section["name"],
        encoders.config_settings(modality, section)
        | {"dtype": jnp.dtype(config.model.dtype), "remat": config.model.remat},
    )


def check_used(config: ml_collections.ConfigDict, settings: Iterable[str]) -> None:
    """Checks that none of these settings, which were given explicitly, is ignored.

    Args:
        config: config with these settings.
        settings: their names, such as "model.video.resnet.widths".

    Raises:
        UserError: naming a setting of another encoder than that of `config`.
    """
    for setting in settings:
        for modality in encoders.BY_MODALITY:
            if setting.startswith(section := f"model.{modality}."):
                encoders.check_used(
                    modality, config.model[modality].name, setting.removeprefix(section)
                )


def audio_visual_model(config: ml_collections.ConfigDict) -> AudioVisualModel:
    """The whole model that pretraining trains."""
    return AudioVisualModel(
        video_encoder=None if config.modalities == "audio" else video_encoder(config),
        audio_encoder=None if config.modalities == "video" else audio_encoder(config),
        embedding_dim=config.model.embedding_dim,
        projection_hidden=config.model.projection_hidden,
        temporal_hidden=config.model.temporal_hidden,
        speeds=tuple(config.views.speeds),
        dtype=jnp.dtype(config.model.dtype),
    )


def preprocessings(
    config: ml_collections.ConfigDict,
) -> dict[str, VideoPreprocessing | AudioPreprocessing]:
    """Preprocessing of raw media for the video and the audio encoder."""
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


def bank_sampling(config: ml_collections.ConfigDict) -> BankSampling:
    """Settings of ranking and sampling the bank's rows.

    Raises:
        UserError: if rows are to be ranked across modalities and only one is trained, or if no
            anchor could get positives.
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
    return BankSampling(
        space=space,
        ranking=section.ranking,
        playbacks=2 * len(config.views.speeds),
        num_positives=section.num_positives,
        num_negatives=section.num_negatives,
        positive_ranks=ranks,
        negative_candidates=section.negative_candidates,
        negative_offset=section.negative_offset,
        positive_sampling=section.positive_sampling,
        negative_sampling=section.negative_sampling,
        temperature=section.temperature,
    )


def bank_labels(config: ml_collections.ConfigDict) -> int:
    """Number of labels of a bank row; without health labels 1, which is unknown."""
    return max(len(config.bank.health_labels), 1)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as sorted JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The config that `to_json` wrote."""
    return ml_collections.ConfigDict(json.loads(text))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differences(old: str, new: str) -> list[str]:
    """Differences between two configs in JSON, one line per key: `key: old -> new`."""
    before, after = flatten(json.loads(old)), flatten(json.loads(new))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)!r} -> {after.get(key, missing)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, missing) != after.get(key, missing)
    ]


def decisive_differences(old: str, new: str) -> list[str]:
    """Entries of `differences` that change results, not only how they are computed."""
    return [line for line in differences(old, new) if line.split(":")[0] not in EXECUTION_KEYS]
