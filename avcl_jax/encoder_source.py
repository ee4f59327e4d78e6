"""Encoders by where they are: a run, its export, or weights imported from PyTorch.

Everything that uses trained encoders names them by one path:

- the workdir of a pretraining run, for its newest checkpoint;
- a directory that contains `video` or `audio` or both as `configs/export.py` and
  `configs/import_weights.py` write them, or the workdir above it;
- the directory of one exported encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.export import Encoder, ExportError, encoder_variables, load_encoder, load_run
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import read_progress

MODALITIES = ("video", "audio")


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """Encoders, and what identifies them.

    Attributes:
        path: path they were read from.
        encoders: modality -> encoder; a run of one modality has one.
        fingerprint: SHA-256 over names, shapes and values of the weights and over architecture and
            preprocessing: equal for a checkpoint and its export.
        step: training step, None where it is unknown (imported weights).
        trained_on: fingerprint of the records that it was pretrained on, with their selection; None
            where it is unknown.
    """

    path: str
    encoders: Mapping[str, Encoder]
    fingerprint: str
    step: int | None
    trained_on: str | None

    def require(self, modality: str) -> Encoder:
        """Returns the encoder of `modality`.

        Raises:
            ExportError: if there is none.
        """
        if modality not in self.encoders:
            raise ExportError(
                f"{self.path} has no {modality} encoder, only {' and '.join(self.encoders)}"
            )
        return self.encoders[modality]


def open_encoders(path: epath.PathLike) -> EncoderSource:
    """Loads the encoders that `path` names, as the module says.

    Args:
        path: local or gs://.

    Raises:
        ExportError: if it contains neither a run nor an exported encoder, or a damaged one.
        CheckpointError: if it contains a run without a checkpoint.
    """
    directory = absolute_path(path)
    if not directory.is_dir():
        raise ExportError(
            f"there is no directory {directory}: give the workdir of a run, or an exported encoder"
        )
    if (directory / "checkpoints").exists():
        return source_of_run(directory, *load_run(directory))
    if (directory / "config.json").exists():
        encoder = load_encoder(directory)
        return _source(directory, {encoder.modality: encoder})
    for parent in (directory, directory / "export"):
        found = [m for m in MODALITIES if (parent / m / "config.json").exists()]
        if found:
            return _source(directory, {m: load_encoder(parent / m) for m in found})
    names = sorted(path.name for path in directory.iterdir())
    raise ExportError(
        f"{directory} contains {', '.join(names) or 'nothing'}, neither checkpoints nor "
        "exported encoders: pretrain there, or export to it"
    )


def random_like(source: EncoderSource, seed: int) -> EncoderSource:
    """Returns encoders of the same architecture and preprocessing with newly drawn weights.

    Args:
        source: whose architecture.
        seed: seed of the weights.
    """
    encoders = {}
    for number, (modality, encoder) in enumerate(source.encoders.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        encoders[modality] = dataclasses.replace(encoder, params=new_weights(encoder, key))
    renewed = _source(epath.Path(source.path), encoders)
    return dataclasses.replace(
        renewed, path=f"random like {source.path}", step=None, trained_on=None
    )


def new_weights(encoder: Encoder, key: jax.Array) -> dict[str, Any]:
    """Draws new initial weights for an encoder."""
    example = jnp.zeros((1, *encoder.input_shape), jnp.float32)
    init = jax.jit(functools.partial(encoder.module.init, train=False))
    return jax.device_get(dict(init(key, example)))


def source_of_run(
    directory: epath.PathLike,
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    step: int,
) -> EncoderSource:
    """Returns the encoders of a run that `load_run` has loaded."""
    directory = absolute_path(directory)
    model = experiment.audio_visual_model(config)
    encoders = {}
    for modality, preprocessing in experiment.preprocessings(config).items():
        module = getattr(model, f"{modality}_encoder")
        if module is not None:
            encoders[modality] = Encoder.of_module(
                module.clone(remat="none"),
                encoder_variables(variables, modality),
                preprocessing,
                source={
                    "workdir": str(directory),
                    "name": config.name,
                    "step": step,
                    "data": read_progress(directory, step).data_fingerprint,
                },
            )
    return _source(directory, encoders)


def heads_digest(variables: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of names, shapes and values of a run's projection and temporal heads."""
    heads = {
        kind: {name: tree for name, tree in trees.items() if not name.endswith("_encoder")}
        for kind, trees in variables.items()
    }
    return variables_digest(heads)


def variables_digest(variables: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of names, types, shapes and values of a nested dict of arrays."""
    digest = hashlib.sha256()
    _update(digest, variables)
    return digest.hexdigest()


def _update(digest: Any, variables: Mapping[str, Any]) -> None:
    """Feeds names, types, shapes and values into a hash."""
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    for name, value in sorted(flat.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())


def _source(directory: epath.Path, encoders: Mapping[str, Encoder]) -> EncoderSource:
    digest = hashlib.sha256()
    for modality, encoder in sorted(encoders.items()):
        described = {k: encoder.config[k] for k in ("encoder", "preprocessing")}
        digest.update(f"{modality} {json.dumps(described, sort_keys=True)}".encode())
        _update(digest, encoder.params)

    def common(key: str) -> Any:
        """The value that all encoders agree on; None for imported weights and older exports."""
        said = {encoder.config["source"].get(key) for encoder in encoders.values()}
        return said.pop() if len(said) == 1 else None

    return EncoderSource(
        path=str(directory),
        encoders=dict(encoders),
        fingerprint=digest.hexdigest(),
        step=common("step"),
        trained_on=common("data"),
    )
