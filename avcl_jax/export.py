"""Encoders as files: safetensors, config.json and StableHLO; and raw media to features from them.

    python -m avcl_jax.main --config=configs/export.py --workdir=runs/demo

    encoder = load_encoder("export/video")
    features = encoder(frames, fps)          # uint8 [T, H, W, 3] of any size, length and rate

Preprocessing calls the functions of the training pipeline. Records are smaller than the files that
they were made of and coded as JPEG, so features of both differ a little: see docs/encoders.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.errors import UserError
from avcl_jax.models.encoders import CLASSES
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import load_variables, read_progress

# Raised when an older reader would misread a newer file.
FORMAT_VERSION = 1
_BATCH = 16  # clips that are encoded at a time
_CONFIG, _WEIGHTS, _STABLEHLO = "config.json", "model.safetensors", "encoder.stablehlo"


class ExportError(UserError):
    """An encoder cannot be exported, or an exported one cannot be read."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded encoder: parameters, a pure function, and the preprocessing that belongs to it.

    Attributes:
        modality: "video" or "audio".
        params: nested dict of arrays, `params` and, where it has any, `batch_stats`.
        preprocess: (frames, fps) or (waveform, sample_rate_hz) to a batch of clips.
        config: all of config.json: architecture, preprocessing, source run.
        module: the Linen module, for further training.
    """

    modality: Literal["video", "audio"]
    params: Mapping[str, Any]
    preprocess: VideoPreprocessing | AudioPreprocessing
    config: Mapping[str, Any]
    module: nn.Module

    def apply(self, params: Mapping[str, Any], batch: Any, *, pooled: bool = True) -> jax.Array:
        """Encodes a batch of clips; pure, so it can be jitted, differentiated and vmapped.

        Args:
            params: variables, such as `self.params`.
            batch: what `preprocess` returns: uint8 [B, T, H, W, 3] or float32 [B, frames, mels].
            pooled: average over time and space.

        Returns:
            float32 [B, C]; unpooled [B, T', H', W', C] for video, [B, F', M', C] for audio.
        """
        clips = self.preprocess.standardise(batch)
        outputs: Any = self.module.apply(params, clips, train=False)
        return outputs["features"] if pooled else outputs["map"].astype(jnp.float32)

    def __call__(
        self,
        media: np.ndarray,
        rate: float,
        *,
        speed: int = 1,
        pooled: bool = True,
        batch_size: int = _BATCH,
    ) -> np.ndarray:
        """Encodes raw frames or a raw waveform of any length and rate.

        Args:
            media: uint8 [T, H, W, 3], or int16 or float [samples].
            rate: frames or samples per second.
            speed: see `preprocess`.
            pooled: see `apply`.
            batch_size: clips encoded at a time; the last batch is padded, so one shape is compiled.

        Returns:
            float32 [clips, …] as `apply` returns.

        Raises:
            UserError: if media are of a shape, type or rate that cannot be taken.
        """
        clips = self.preprocess(media, rate, speed=speed)
        features = []
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            padding = [(0, batch_size - len(batch))] + [(0, 0)] * (clips.ndim - 1)
            encoded = self._jitted(self.params, np.pad(batch, padding), pooled=pooled)
            features.append(np.asarray(encoded)[: len(batch)])
        return np.concatenate(features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one clip: [time, height, width, 3] or [frames, mels]."""
        return _example_shape(self.preprocess)

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        params: Mapping[str, Any],
        preprocessing: VideoPreprocessing | AudioPreprocessing,
        *,
        source: Mapping[str, Any],
    ) -> Encoder:
        """Makes an encoder of its parts; `source` says where it comes from, in JSON."""
        config = _describe(module, preprocessing, source)
        return cls(config["modality"], params, preprocessing, config, module)

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.apply, static_argnames="pooled")


def export_encoder(
    directory: epath.PathLike,
    *,
    encoder: nn.Module,
    params: Mapping[str, Any],
    preprocessing: VideoPreprocessing | AudioPreprocessing,
    source: Mapping[str, Any],
) -> epath.Path:
    """Writes model.safetensors, encoder.stablehlo and, last, config.json.

    The directory is complete when config.json is there.

    Args:
        directory: output directory, made if needed; an older export in it is replaced.
        encoder: encoder of a class of `avcl_jax.models.encoders`.
        params: nested dict with `params` and, where it has any, `batch_stats` of the encoder alone.
        preprocessing: what belongs to it.
        source: origin, JSON: config fingerprint, step, versions.

    Returns:
        The directory.

    Raises:
        ExportError: if the encoder is none of the known classes.
    """
    name = type(encoder).__name__
    if name not in CLASSES:
        raise ExportError(f"cannot export a {name}; known encoders: {', '.join(sorted(CLASSES))}")
    encoder = encoder.clone(remat="none")  # how a run saved memory is not what it learned
    directory = absolute_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG).unlink(missing_ok=True)
    flat = {
        key: np.ascontiguousarray(jax.device_get(value))
        for key, value in flax.traverse_util.flatten_dict(dict(params), sep="/").items()
    }
    (directory / _WEIGHTS).write_bytes(safetensors.numpy.save(flat))
    config = _describe(encoder, preprocessing, source)
    config["stablehlo"] = {
        "inputs": [*sorted(flat), "batch"],
        "batch": [_BATCH, *_example_shape(preprocessing)],
        "output": "features",
    }
    loaded = _build(config, flat, where=str(directory))
    (directory / _STABLEHLO).write_bytes(_stablehlo(loaded, flat))
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return directory


def load_run(
    workdir: epath.PathLike,
) -> tuple[ml_collections.ConfigDict, dict[str, Any], int]:
    """Loads a pretraining run, including the heads, which an export leaves out.

    Args:
        workdir: working directory of the run, local or gs://.

    Returns:
        Config with which it ran, variables of `experiment.audio_visual_model`, step.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        CheckpointError: if the run has no checkpoint.
    """
    config = config_of_run(workdir)
    variables, step = load_variables(absolute_path(workdir))
    return config, variables, step


def config_of_run(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """Reads the config with which a pretraining run ran; reads no checkpoint.

    Args:
        workdir: working directory of the run, local or gs://.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
    """
    directory = absolute_path(workdir)
    path = directory / _CONFIG
    if not (directory / "checkpoints").exists() or not path.exists():
        raise ExportError(
            f"{directory} does not contain a pretraining run: give the workdir of one (an exported "
            "encoder lacks the heads that were trained with it)"
        )
    try:
        config = experiment.from_json(path.read_text())
        task = config.task
    except (ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is damaged: {error}") from error
    if task != "pretrain":
        raise ExportError(
            f"{directory} contains a run of task {task!r}: give the workdir of a pretraining run"
        )
    return config


def export_run(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Exports the encoders of the newest checkpoint of a run to WORKDIR/export/{video,audio}.

    Args:
        config: not used: model and preprocessing are those of the run's own config.
        workdir: working directory of the run, local or gs://.

    Returns:
        Directory of each modality that the run trained.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        CheckpointError: if the run has no checkpoint.
    """
    del config
    workdir = absolute_path(workdir)
    config, variables, step = load_run(workdir)
    spec = experiment.render_spec(config)
    model = experiment.audio_visual_model(config)
    run_config = (workdir / "config.json").read_text()
    source = {
        "workdir": str(workdir),
        "name": config.name,
        "step": step,
        "data": read_progress(workdir, step).data_fingerprint,
        "seed": config.seed,
        "trained_speeds": list(spec.views.speeds),
        "config_sha256": hashlib.sha256(run_config.encode()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    }
    exported = {}
    for modality, preprocessing in experiment.preprocessings(config).items():
        encoder = getattr(model, f"{modality}_encoder")
        if encoder is None:
            continue
        exported[modality] = export_encoder(
            workdir / "export" / modality,
            encoder=encoder,
            params=encoder_variables(variables, modality),
            preprocessing=preprocessing,
            source=source,
        )
        print(f"encoder {exported[modality]}", flush=True)
    return exported


def encoder_variables(variables: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The part of a run's `params` and `batch_stats` that belongs to one encoder.

    A transformer has no statistics, and then no `batch_stats`.
    """
    name = f"{modality}_encoder"
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def load_encoder(path: epath.PathLike) -> Encoder:
    """Loads an encoder that `export_encoder` wrote.

    Args:
        path: its directory, for instance `WORKDIR/export/video`; local or gs://.

    Returns:
        The encoder, ready for raw media.

    Raises:
        ExportError: if a file is missing or damaged, the encoder or the format unknown, or the
            weights are not those of the architecture.
    """
    directory = absolute_path(path)
    try:
        config = json.loads((directory / _CONFIG).read_text())
        flat = safetensors.numpy.load((directory / _WEIGHTS).read_bytes())
    except FileNotFoundError as error:
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
        raise ExportError(
            f"{directory} is not an exported encoder: it lacks {epath.Path(error.filename).name} "
            f"and contains {found}. Give the directory of one encoder, for instance export/video"
        ) from error
    except json.JSONDecodeError as error:
        raise ExportError(f"{directory / _CONFIG} is damaged: {error}; export again") from error
    except safetensors.SafetensorError as error:
        raise ExportError(f"{directory / _WEIGHTS} is damaged: {error}; export again") from error
    return _build(config, flat, where=str(directory))


def _build(config: Mapping[str, Any], flat: Mapping[str, np.ndarray], *, where: str) -> Encoder:
    if config["format_version"] != FORMAT_VERSION:
        raise ExportError(
            f"{where} has format {config['format_version']}, this version reads {FORMAT_VERSION}"
        )
    arguments = dict(config["encoder"])
    name = arguments.pop("class")
    if name not in CLASSES:
        raise ExportError(f"{where}: unknown encoder {name!r}; known: {', '.join(sorted(CLASSES))}")
    arguments["dtype"] = jnp.dtype(arguments["dtype"])
    module = CLASSES[name](**{k: _hashable(v) for k, v in arguments.items()})
    modality = config["modality"]
    preprocessing: VideoPreprocessing | AudioPreprocessing
    if modality == "video":
        preprocessing = VideoPreprocessing(**config["preprocessing"])
    elif modality == "audio":
        preprocessing = AudioPreprocessing(LogMelSpec(**config["preprocessing"]["log_mel"]))
    else:
        raise ExportError(f"{where}: modality {modality!r} is neither 'video' nor 'audio'")
    _check_weights(module, preprocessing, flat, where)
    params = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    return Encoder(modality, params, preprocessing, config, module)


def _describe(
    module: nn.Module,
    preprocessing: VideoPreprocessing | AudioPreprocessing,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what config.json says of an encoder."""
    return {
        "format_version": FORMAT_VERSION,
        "modality": "video" if isinstance(preprocessing, VideoPreprocessing) else "audio",
        "encoder": {"class": type(module).__name__, **_module_arguments(module)},
        "preprocessing": dataclasses.asdict(preprocessing),
        "source": dict(source),
    }


def _hashable(value: Any) -> Any:
    """Returns JSON lists as the tuples that Linen modules hash."""
    return tuple(value) if isinstance(value, list) else value


def _module_arguments(module: nn.Module) -> dict[str, Any]:
    arguments = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }
    return arguments | {"dtype": jnp.dtype(arguments["dtype"]).name}


def _example_shape(preprocessing: VideoPreprocessing | AudioPreprocessing) -> tuple[int, ...]:
    if isinstance(preprocessing, VideoPreprocessing):
        size = preprocessing.image_size
        return (preprocessing.num_frames, size, size, 3)
    return (preprocessing.log_mel.frames, preprocessing.log_mel.mels)


def _check_weights(
    module: nn.Module,
    preprocessing: VideoPreprocessing | AudioPreprocessing,
    flat: Mapping[str, np.ndarray],
    where: str,
) -> None:
    """Compares names and shapes with those of the architecture."""
    example = jax.ShapeDtypeStruct((1, *_example_shape(preprocessing)), jnp.float32)
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), example)
    expected = {
        key: value.shape
        for key, value in flax.traverse_util.flatten_dict(dict(shapes), sep="/").items()
    }
    actual = {key: value.shape for key, value in flat.items()}
    wrong = sorted(
        key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)
    )
    if wrong:
        key = wrong[0]
        raise ExportError(
            f"{where}: {len(wrong)} weights do not fit the architecture, first {key}: "
            f"{actual.get(key, 'missing')} in the file, {expected.get(key, 'nothing')} expected"
        )


def _stablehlo(encoder: Encoder, flat: Mapping[str, np.ndarray]) -> bytes:
    """Returns features(weights in sorted order, batch of 16 clips) as portable StableHLO.

    A dynamic batch size would need passes that only JAX has, and several platforms an additional
    input that selects one.
    """
    names = sorted(flat)

    def features(*inputs: Any) -> jax.Array:
        params = flax.traverse_util.unflatten_dict(
            dict(zip(names, inputs[:-1], strict=True)), sep="/"
        )
        return encoder.apply(params, inputs[-1])

    dtype = jnp.uint8 if encoder.modality == "video" else jnp.float32
    example = jax.ShapeDtypeStruct((_BATCH, *encoder.input_shape), dtype)
    weights = [jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype) for name in names]
    exported = jax.export.export(jax.jit(features, keep_unused=True), platforms=("cpu",))(
        *weights, example
    )
    return exported.mlir_module_serialized
