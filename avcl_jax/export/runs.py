"""Encoders by name or location: a run, its export, or weights imported from PyTorch.

Everything that uses trained encoders names them by one argument:

- the workdir of a pretraining run, for its newest checkpoint;
- a directory that contains `video` or `audio` or both as `configs/export.py` and
  `configs/import_weights.py` write them, or the workdir above it;
- the directory of one exported encoder;
- the name of encoders that come with the package, or an address of the Hugging Face Hub
  (`avcl_jax.weights`).

Runs are read by Orbax, which takes as long to import as JAX: functions import it when they need it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from avcl_jax import weights
from avcl_jax.export.encoder import (
    MODALITIES,
    Encoder,
    ExportError,
    export_encoder,
    flatten,
    load_encoder,
)
from avcl_jax.paths import absolute_path, write_bytes

if TYPE_CHECKING:
    import ml_collections


def load_run(
    workdir: epath.PathLike,
) -> tuple[ml_collections.ConfigDict, dict[str, Any], int]:
    """Loads a pretraining run, including the heads, which an export leaves out.

    Returns:
        Config with which it ran, variables of `experiment.audio_visual_model`, step.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        CheckpointError: if the run has no checkpoint.
    """
    from avcl_jax.training.checkpoint import load_variables

    return config_of_run(workdir), *load_variables(workdir)


def config_of_run(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """Reads the config with which a pretraining run ran; reads no checkpoint.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
    """
    from avcl_jax import experiment

    directory = weights.find(workdir)
    path = directory / "config.json"
    if not (directory / "checkpoints").exists() or not path.exists():
        raise ExportError(
            f"{weights.canonical(workdir)} does not contain a pretraining run: give the workdir of "
            "one (an exported encoder lacks the heads that were trained with it)"
        )
    try:
        config = experiment.from_json(path.read_text())
        task = config.task
    except (ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if task != experiment.PRETRAIN:
        raise ExportError(
            f"{directory} contains a run of task {task!r}: give the workdir of a pretraining run"
        )
    return config


def export_run(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Exports the encoders of the newest checkpoint of a run to WORKDIR/export/{video,audio}.

    Beside them it writes a model card, with the results if the run was evaluated. Of `config` only
    the licence is read: model and preprocessing are those of the run's own config.

    Returns:
        Directory of each modality that the run trained.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        CheckpointError: if the run has no checkpoint.
    """
    from avcl_jax import experiment
    from avcl_jax.export import card

    license = config.license
    workdir = absolute_path(workdir)
    config, variables, step = load_run(workdir)
    run_config = (workdir / "config.json").read_text()
    origin = {
        "seed": config.seed,
        "trained_speeds": list(experiment.render_spec(config).views.speeds),
        "config_sha256": hashlib.sha256(run_config.encode()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    }
    run = source_of_run(workdir, config, variables, step)
    exported, encoders = {}, {}
    for modality, encoder in run.encoders.items():
        source = encoder.config["source"] | origin
        exported[modality] = export_encoder(
            workdir / "export" / modality,
            encoder=encoder.module,
            params=encoder.params,
            preprocessing=encoder.preprocess,
            source=source,
        )
        print(f"encoder {exported[modality]}", flush=True)
        described = {**encoder.config, "source": source}
        encoders[modality] = dataclasses.replace(encoder, config=described)
    results = _results_of(workdir, run)
    text = card.model_card(encoders, config, results, license=license)
    write_bytes(path := workdir / "export" / card.NAME, text.encode())
    print(f"card    {path}", flush=True)
    return exported


def _results_of(workdir: epath.Path, run: EncoderSource) -> dict[str, Any] | None:
    """Returns results.json of a run if they are those of these encoders."""
    if not (path := workdir / "results.json").exists():
        return None
    results = json.loads(path.read_text())
    # A run that was trained further since it was evaluated has other weights.
    return results if results["encoder"]["fingerprint"] == run.fingerprint else None


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


def open_encoders(path: epath.PathLike, *, known: str | None = None) -> EncoderSource:
    """Loads the encoders that a path or name stands for, as the module says.

    Args:
        known: fingerprint of encoders that were loaded before: weights that still have it need not
            be compared with their architecture again.

    Raises:
        ExportError: if it contains neither a run nor an exported encoder, or a damaged one.
        CheckpointError: if it contains a run without a checkpoint.
    """
    directory, given = weights.find(path), weights.canonical(path)
    if not directory.is_dir():
        raise ExportError(weights.missing(path))
    if (directory / "checkpoints").exists():
        return source_of_run(directory, *load_run(directory))
    if (directory / "config.json").exists():
        encoder = load_encoder(directory, check=known is None)
        source = _source(given, {encoder.modality: encoder})
        return source if known in (None, source.fingerprint) else open_encoders(path)
    for parent in (directory, directory / "export"):
        found = [m for m in MODALITIES if (parent / m / "config.json").exists()]
        if found:
            encoders = {m: load_encoder(parent / m, check=known is None) for m in found}
            source = _source(given, encoders)
            return source if known in (None, source.fingerprint) else open_encoders(path)
    names = sorted(path.name for path in directory.iterdir())
    raise ExportError(
        f"{directory} contains {', '.join(names) or 'nothing'}, neither checkpoints nor "
        "exported encoders: pretrain there, or export to it"
    )


def source_of_run(
    directory: epath.PathLike,
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    step: int,
) -> EncoderSource:
    """Encoders of a run that `load_run` has loaded."""
    directory = absolute_path(directory)
    return _source(str(directory), _encoders_of_run(directory, config, variables, step))


def _encoders_of_run(
    directory: epath.Path,
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    step: int,
) -> dict[str, Encoder]:
    from avcl_jax import experiment
    from avcl_jax.training.checkpoint import read_progress

    model = experiment.audio_visual_model(config)
    source = {
        "name": config.name,
        "step": step,
        "data": read_progress(directory, step).data_fingerprint,
    }
    encoders = {}
    for modality, preprocessing in experiment.preprocessings(config).items():
        module = getattr(model, name := f"{modality}_encoder")
        if module is not None:
            # A transformer has no statistics, and then no `batch_stats`.
            own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
            module = module.clone(remat="none")
            encoders[modality] = Encoder.of_module(module, own, preprocessing, source=source)
    return encoders


def random_like(source: EncoderSource, seed: int) -> EncoderSource:
    """Encoders of the same architecture and preprocessing with newly drawn weights."""
    import jax
    import jax.numpy as jnp

    encoders = {}
    for number, (modality, encoder) in enumerate(source.encoders.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        example = jnp.zeros((1, *encoder.input_shape), jnp.float32)
        init = jax.jit(functools.partial(encoder.module.init, train=False))
        params = jax.device_get(dict(init(key, example)))
        encoders[modality] = dataclasses.replace(encoder, params=params)
    renewed = _source(f"random like {source.path}", encoders)
    return dataclasses.replace(renewed, step=None, trained_on=None)


def heads_digest(variables: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values of a run's projection and temporal heads."""
    heads = {
        kind: {name: tree for name, tree in trees.items() if not name.endswith("_encoder")}
        for kind, trees in variables.items()
    }
    return variables_digest(heads)


def variables_digest(variables: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values of a nested dict of arrays."""
    _update(digest := hashlib.sha256(), variables)
    return digest.hexdigest()


def _update(digest: Any, variables: Mapping[str, Any]) -> None:
    for name, value in sorted(flatten(variables).items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())


def _source(path: str, encoders: Mapping[str, Encoder]) -> EncoderSource:
    digest = hashlib.sha256()
    for modality, encoder in sorted(encoders.items()):
        described = {k: encoder.config[k] for k in ("encoder", "preprocessing")}
        digest.update(f"{modality} {json.dumps(described, sort_keys=True)}".encode())
        _update(digest, encoder.params)

    def common(key: str) -> Any:
        """The value that all encoders agree on; None for imported weights and older exports."""
        values = {encoder.config["source"].get(key) for encoder in encoders.values()}
        return values.pop() if len(values) == 1 else None

    return EncoderSource(path, dict(encoders), digest.hexdigest(), common("step"), common("data"))
