"""One encoder as files: safetensors, config.json and StableHLO.

JAX and Flax take seconds to import, so functions import them when they compute.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from avcl_jax import weights
from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path

if TYPE_CHECKING:
    import flax.linen as nn
    import jax

    from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing

MODALITIES = ("video", "audio")
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
    """

    modality: Literal["video", "audio"]
    params: Mapping[str, Any]
    preprocess: VideoPreprocessing | AudioPreprocessing
    config: Mapping[str, Any]

    @property
    def description(self) -> str:
        """Text that decides, with `preprocess`, what `apply` computes."""
        return json.dumps(self.config["encoder"], sort_keys=True)

    @classmethod
    def without_weights(
        cls, description: str, preprocess: VideoPreprocessing | AudioPreprocessing
    ) -> Encoder:
        """Makes an encoder whose `apply` can be cached by these two, which can be hashed."""
        return cls(preprocess.modality, {}, preprocess, {"encoder": json.loads(description)})

    @functools.cached_property
    def module(self) -> nn.Module:
        """The Linen module, for further training.

        Raises:
            ExportError: if its class is unknown.
        """
        from avcl_jax.models.encoders import CLASSES

        arguments = dict(self.config["encoder"])
        name = arguments.pop("class")
        if name not in CLASSES:
            raise ExportError(f"unknown encoder {name!r}; known: {', '.join(sorted(CLASSES))}")
        arguments["dtype"] = np.dtype(arguments["dtype"])
        # Linen modules are hashed, so lists from JSON become tuples.
        return CLASSES[name](
            **{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        )

    def apply(self, params: Mapping[str, Any], batch: Any, *, pooled: bool = True) -> jax.Array:
        """Encodes a batch of clips; pure, so it can be jitted, differentiated and vmapped.

        Args:
            params: variables, such as `self.params`.
            batch: clips from `preprocess`: uint8 [B, T, H, W, 3] or float32 [B, frames, mels].
            pooled: average over time and space.

        Returns:
            float32 [B, C]; unpooled [B, T', H', W', C] for video, [B, F', M', C] for audio.
        """
        clips = self.preprocess.standardise(batch)
        outputs: Any = self.module.apply(params, clips, train=False)
        return outputs["features"] if pooled else outputs["map"].astype(np.float32)

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
        return self.preprocess.clip_shape

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
        fields = {
            field.name: getattr(module, field.name)
            for field in dataclasses.fields(module)
            if field.name not in ("parent", "name")
        }
        config = {
            "format_version": FORMAT_VERSION,
            "modality": preprocessing.modality,
            "encoder": {"class": type(module).__name__}
            | fields
            | {"dtype": np.dtype(fields["dtype"]).name},
            "preprocessing": dataclasses.asdict(preprocessing),
            "source": dict(source),
        }
        return cls(preprocessing.modality, params, preprocessing, config)

    @functools.cached_property
    def _jitted(self) -> Any:
        import jax

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
        directory: output directory, made if needed; an older export in it is replaced. Returned.
        encoder: encoder of a class of `avcl_jax.models.encoders`.
        params: nested dict with `params` and, where it has any, `batch_stats` of the encoder alone.
        preprocessing: its preprocessing of raw media.
        source: origin, JSON: config fingerprint, step, versions.

    Raises:
        ExportError: if the class of the encoder is unknown, or the weights do not fit it.
    """
    import jax

    directory = absolute_path(directory)
    flat = {
        key: np.ascontiguousarray(jax.device_get(value)) for key, value in flatten(params).items()
    }
    # Rematerialisation saves memory in training and is not part of the encoder.
    bare = Encoder.of_module(encoder.clone(remat="none"), params, preprocessing, source=source)
    exported = _build(bare.config, flat, where=str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG).unlink(missing_ok=True)
    (directory / _WEIGHTS).write_bytes(safetensors.numpy.save(flat))
    (directory / _STABLEHLO).write_bytes(_stablehlo(exported, flat))
    config = dict(bare.config)
    config["stablehlo"] = {
        "inputs": [*sorted(flat), "batch"],
        "batch": [_BATCH, *exported.input_shape],
        "output": "features",
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return directory


def load_encoder(path: epath.PathLike, *, check: bool = True) -> Encoder:
    """Loads an encoder that `export_encoder` wrote, ready for raw media.

    Args:
        path: its directory, for instance `WORKDIR/export/video`, local or gs://; the name of one
            that comes with the package, such as "small/video" (`avcl_jax.encoders()`); or an
            address of the Hugging Face Hub, hf://USER/REPO/FOLDER (the extra `hub`).
        check: compare the weights with the architecture, which takes a trace of the network.

    Raises:
        ExportError: if a file is missing or damaged, the encoder or the format unknown, or the
            weights are not those of the architecture.
    """
    directory = weights.find(path)
    try:
        config = json.loads((directory / _CONFIG).read_text())
        flat = safetensors.numpy.load((directory / _WEIGHTS).read_bytes())
    except FileNotFoundError as error:
        if not directory.is_dir():
            raise ExportError(weights.missing(path)) from error
        found = sorted(p.name for p in directory.iterdir())
        one = next((name for name in MODALITIES if name in found), "export/video")
        given = os.fspath(path).rstrip("/")
        raise ExportError(
            f"{given} is not an exported encoder: it lacks {epath.Path(error.filename).name} and "
            f"contains {found}. Give one encoder, for instance {given}/{one}"
        ) from error
    except json.JSONDecodeError as error:
        raise ExportError(f"{directory / _CONFIG} is damaged: {error}; export again") from error
    except safetensors.SafetensorError as error:
        raise ExportError(f"{directory / _WEIGHTS} is damaged: {error}; export again") from error
    return _build(config, flat, where=str(directory), check=check)


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested variables by their path, such as "params/stem_norm/norm/scale"."""
    flat: dict[str, Any] = {}
    for name, value in variables.items():
        inner = flatten(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}/{path}".rstrip("/"): leaf for path, leaf in inner.items()}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    variables: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        place = variables
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return variables


def variable_shapes(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of an encoder's variables by path, for clips of `input_shape`."""
    import jax

    example = jax.ShapeDtypeStruct((1, *input_shape), np.float32)
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), example)
    return {key: value.shape for key, value in flatten(shapes).items()}


def _build(
    config: Mapping[str, Any], flat: Mapping[str, np.ndarray], *, where: str, check: bool = True
) -> Encoder:
    from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
    from avcl_jax.data.spectrogram import LogMelSpec

    if config["format_version"] != FORMAT_VERSION:
        raise ExportError(
            f"{where} has format {config['format_version']}, this version reads {FORMAT_VERSION}"
        )
    modality = config["modality"]
    preprocessing: VideoPreprocessing | AudioPreprocessing
    if modality == "video":
        preprocessing = VideoPreprocessing(**config["preprocessing"])
    elif modality == "audio":
        preprocessing = AudioPreprocessing(LogMelSpec(**config["preprocessing"]["log_mel"]))
    else:
        raise ExportError(f"{where}: modality {modality!r} is neither 'video' nor 'audio'")
    encoder = Encoder(preprocessing.modality, unflatten(flat), preprocessing, config)
    if check:
        _check_weights(encoder, flat, where=where)
    return encoder


def _check_weights(encoder: Encoder, flat: Mapping[str, np.ndarray], *, where: str) -> None:
    try:
        module = encoder.module
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from error
    expected = variable_shapes(module, encoder.input_shape)
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
    import jax
    import jax.export

    names = sorted(flat)

    def features(*inputs: Any) -> jax.Array:
        return encoder.apply(unflatten(dict(zip(names, inputs[:-1], strict=True))), inputs[-1])

    spec = encoder.preprocess
    example = jax.ShapeDtypeStruct((_BATCH, *spec.clip_shape), np.dtype(spec.clip_dtype))
    weights = [jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype) for name in names]
    exported = jax.export.export(jax.jit(features, keep_unused=True), platforms=("cpu",))(
        *weights, example
    )
    return exported.mlir_module_serialized
