"""Encoders that come with the package, by name, and those of the Hugging Face Hub, by address.

Everything that takes the path of an encoder takes one of these names too: `small` is a pair,
`small/video` and `small/audio` its encoders. A path with encoders takes precedence over a name. An
address is `hf://USER/REPO/FOLDER`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from etils import epath

from avcl_jax.paths import absolute_path
from avcl_jax.weights import hub

DEFAULT = "small"

# Pair → one line about it. Its encoders are the folders below that name.
_PAIRS = {
    "small": "trained without labels on rendered videos and ESC-10; for copies of clips and simple "
    "audio, not for recognition of actions",
}
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ShippedEncoder:
    """An encoder that comes with the package.

    Attributes:
        name: argument of `load_encoder`, such as "small/video".
        modality: "video" or "audio".
        megabytes: size of its weights.
        summary: its training and use in one line.
    """

    name: str
    modality: Literal["video", "audio"]
    megabytes: float
    summary: str


def encoders() -> tuple[ShippedEncoder, ...]:
    """Returns the encoders that come with the package; imports no JAX."""
    return tuple(
        ShippedEncoder(
            f"{pair}/{modality}",
            modality,
            round((_HERE / pair / modality / "model.safetensors").stat().st_size / 1e6, 1),
            summary,
        )
        for pair, summary in _PAIRS.items()
        for modality in ("video", "audio")
    )


def names() -> tuple[str, ...]:
    """Returns every name that `find` knows: pairs and their encoders."""
    return tuple(name for pair in _PAIRS for name in (pair, f"{pair}/video", f"{pair}/audio"))


def canonical(encoder: epath.PathLike) -> str:
    """Returns a name or address as it is, a path as an absolute one: for settings and indexes.

    Raises:
        PathError: if it is empty.
    """
    if _is_address(encoder):
        return os.fspath(encoder)
    return _name(encoder) or os.fspath(absolute_path(encoder))


def find(encoder: epath.PathLike) -> epath.Path:
    """Returns the directory that a name, an address or a path stands for; a path need not exist.

    Raises:
        PathError: if it is empty.
        UserError: if it is an address, and the encoder cannot be fetched.
    """
    if _is_address(encoder):
        return hub.fetch(os.fspath(encoder))
    name = _name(encoder)
    return epath.Path(_HERE / name) if name else absolute_path(encoder)


def missing(encoder: epath.PathLike) -> str:
    """Returns the error for a missing directory, with the names of all encoders."""
    return (
        f"there is no directory {absolute_path(encoder)}: give the workdir of a run, an exported "
        f"encoder, or one that comes with the package: {', '.join(names())}"
    )


def _is_address(encoder: epath.PathLike) -> bool:
    return os.fspath(encoder).startswith(hub.PREFIX)


def _name(encoder: epath.PathLike) -> str:
    """Returns the name of a shipped encoder, or "" for a path.

    A folder that has the name by chance, such as one with small videos, is not a path of encoders.
    """
    name = os.fspath(encoder).rstrip("/")
    return name if name in names() and not _has_encoders(absolute_path(name)) else ""


def _has_encoders(directory: epath.Path) -> bool:
    """Returns whether a directory looks like a run, an export or one encoder, complete or not."""
    marks = ("checkpoints", "config.json", "video/config.json", "audio/config.json", "export")
    return any((directory / mark).exists() for mark in marks)
