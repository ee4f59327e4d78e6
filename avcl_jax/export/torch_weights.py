"""Weights of published PyTorch code in our encoders, and ours under its names.

    python -m avcl_jax.main --config=configs/import_weights.py:torchvision,r2plus1d_18 \\
        --config.checkpoint=r2plus1d_18-91a641e6.pth --workdir=runs/r2plus1d_18
    python -m avcl_jax.main --config=configs/export.py:torchvision \\
        --config.encoder=runs/demo/export/video --workdir=runs/demo

The first writes WORKDIR/export/video (or audio), which `avcl_jax.export.load_encoder` reads; the
second WORKDIR/torchvision.safetensors, which `load_state_dict` takes. The tables of names are in
`avcl_jax.export.torch_names`; nothing is guessed, and nothing is left over in silence.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.export import torch_names
from avcl_jax.export.encoder import (
    export_encoder,
    flatten,
    load_encoder,
    unflatten,
    variable_shapes,
)
from avcl_jax.export.torch_names import CODE_BASES, UNUSED_SUFFIX
from avcl_jax.models import encoders
from avcl_jax.models.encoders import Modality
from avcl_jax.paths import absolute_path

# Under which training code keeps the state dict of its model.
_STATE_KEYS = ("model", "state_dict")
# What `nn.DataParallel` and its distributed sibling put before every name.
_PARALLEL_PREFIX = "module."
# Parameters of convolutional encoders do not depend on it; it only has to be large enough.
_EXAMPLES = {"video": (8, 32, 32, 3), "audio": (64, 64)}


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a checkpoint by name, without running anything that it may contain.

    Args:
        path: a .safetensors file, or what `torch.save` wrote: a state dict, or a training
            checkpoint with one under "model" or "state_dict". The latter needs PyTorch installed.

    Returns:
        Arrays by name, without the prefix of `nn.DataParallel`.

    Raises:
        UserError: if the file is neither, or contains objects other than arrays and settings.
        FileNotFoundError: if there is none.
    """
    path = absolute_path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.suffix == ".safetensors":
        try:
            state = safetensors.numpy.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
    else:
        state = _read_with_torch(path)
    if all(name.startswith(_PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(_PARALLEL_PREFIX): array for name, array in state.items()}
    return state


def _read_with_torch(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs PyTorch to be read: `pip install torch`, or save its state dict as "
            "safetensors"
        ) from error
    try:
        # Training code often saves its arguments together with its weights.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as weights only: {reason}") from error
    if isinstance(loaded, Mapping):
        nested = [loaded[key] for key in _STATE_KEYS if isinstance(loaded.get(key), Mapping)]
        loaded = nested[0] if nested else loaded
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path} contains a {type(loaded).__name__}, not a state dict")
    other = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(
            f"{path} contains no state dict, neither at the top nor under "
            f"{' or '.join(_STATE_KEYS)}: {_some(other)} are not arrays"
        )
    return {
        name: (value.float() if value.is_floating_point() else value).numpy()
        for name, value in loaded.items()
    }


def from_torch(
    state: Mapping[str, np.ndarray], *, code_base: str, name: str, modality: Modality
) -> dict[str, Any]:
    """Converts a state dict to the variables of our encoder `name`.

    Args:
        state: arrays by the names of `code_base`, a key of `CODE_BASES`.

    Returns:
        Nested float32 `params` and `batch_stats`.

    Raises:
        UserError: naming arrays that are missing, left over, or of another shape.
    """
    names, encoder, arrays = _table(code_base, name, modality)
    given = dict(state)
    theirs = {array.theirs for array in arrays}
    missing = sorted(theirs - given.keys())
    unused = names.unused[modality]
    left = sorted(
        key
        for key in given.keys() - theirs
        if not key.startswith(unused) and not _is_counter_of(key, theirs)
    )
    if missing or left:
        raise UserError(
            f"not the weights of {code_base}'s {name}:"
            + (f" {_some(missing)} missing;" if missing else "")
            + (f" {_some(left)} left over;" if left else "")
            + f" known are {', '.join(f'{base}: {_tables(base)}' for base in CODE_BASES)}"
        )
    flat = {}
    for array in arrays:
        value = np.asarray(given[array.theirs], np.float32)
        if array.kind == "conv":
            value = torch_names.kernel_from_torch(value, mels_first=names.mels_first)
        flat[array.ours] = value
    shapes = variable_shapes(encoder, _EXAMPLES[modality])
    for array in arrays:
        expected, actual = shapes[array.ours], flat[array.ours].shape
        if actual != expected:
            raise UserError(
                f"{array.theirs} is {actual} in our order of axes, {name} has {expected}"
            )
    return unflatten(flat)


def to_torch(
    variables: Mapping[str, Any], *, code_base: str, name: str, modality: Modality
) -> dict[str, np.ndarray]:
    """Converts nested variables of our encoder `name` to a state dict; inverse of `from_torch`.

    Raises:
        UserError: if that code base has no such encoder, or the variables do not fit it.
    """
    names, _, arrays = _table(code_base, name, modality)
    flat = flatten(variables)
    ours = {array.ours for array in arrays}
    if flat.keys() != ours:
        raise UserError(
            f"not the variables of {name}: {_some(sorted(flat.keys() ^ ours))} on one side only"
        )
    state = {}
    for array in arrays:
        value = np.asarray(flat[array.ours], np.float32)
        if array.kind == "conv":
            value = torch_names.kernel_to_torch(value, mels_first=names.mels_first)
        state[array.theirs] = np.ascontiguousarray(value)
    return state


def import_weights(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Writes WORKDIR/export/MODALITY from `config.checkpoint`, as configs/import_weights.py says.

    Raises:
        UserError: if the config does not fit, or the checkpoint is not one of the encoder.
    """
    if not config.checkpoint:
        raise UserError("config.checkpoint is missing: the file with the weights")
    modality: Modality = config.modalities
    if modality not in encoders.BY_MODALITY:
        raise UserError(
            f"modalities {modality!r} must be 'video' or 'audio': weights of one encoder are "
            "imported"
        )
    # Names and settings are checked before the weights are read.
    encoder = getattr(experiment.audio_visual_model(config), f"{modality}_encoder")
    preprocessing = experiment.preprocessings(config)[modality]
    _table(config.code_base, config.model[modality].name, modality)
    checkpoint, state = absolute_path(config.checkpoint), read_state_dict(config.checkpoint)
    names = {"code_base": config.code_base, "name": config.model[modality].name}
    variables = from_torch(state, **names, modality=modality)
    directory = export_encoder(
        absolute_path(workdir) / "export" / modality,
        encoder=encoder,
        params=variables,
        preprocessing=preprocessing,
        source={
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            **names,
        },
    )
    print(f"encoder {directory}", flush=True)
    return directory


def export_weights(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Writes the exported encoder `config.encoder` to WORKDIR/CODE_BASE.safetensors.

    Raises:
        ExportError: if the directory contains no encoder.
        UserError: if the code base has no such encoder.
    """
    _code_base(config.code_base)
    encoder = load_encoder(config.encoder)
    name = encoders.published_name(encoder.module)
    if name is None:
        raise UserError(
            f"{config.encoder} contains a {type(encoder.module).__name__} that is not a published "
            "network: only those have layers with names elsewhere (docs/encoders.md)"
        )
    state = to_torch(
        encoder.params, code_base=config.code_base, name=name, modality=encoder.modality
    )
    path = absolute_path(workdir) / f"{config.code_base}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.numpy.save(state))
    print(f"weights {path}", flush=True)
    return path


def _table(
    code_base: str, name: str, modality: Modality
) -> tuple[torch_names.CodeBase, nn.Module, list[torch_names.NamedArray]]:
    """Returns the code base, a bare encoder of that name, and its arrays under both names."""
    names = _code_base(code_base)
    if name not in names.tables or name not in encoders.BY_MODALITY[modality]:
        raise UserError(
            f"{code_base} has no {modality} encoder {name!r}: it has {_tables(code_base)}"
        )
    settings = {"subtract_time_mean": False} if modality == "video" else {}
    encoder = encoders.create_encoder(modality, name, settings)
    return names, encoder, torch_names.named_arrays(names, name, modality, encoder)


def _code_base(name: str) -> torch_names.CodeBase:
    if name not in CODE_BASES:
        raise UserError(f"unknown code base {name!r}: use one of {', '.join(CODE_BASES)}")
    return CODE_BASES[name]


def _is_counter_of(key: str, theirs: Iterable[str]) -> bool:
    """True if `key` counts the batches of a normalisation that the table names."""
    owner = key.removesuffix(UNUSED_SUFFIX)
    return owner != key and f"{owner}.running_mean" in theirs


def _tables(code_base: str) -> str:
    return ", ".join(CODE_BASES[code_base].tables)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
