"""Encoders from the Hugging Face Hub, through its own library (the extra `hub`)."""

from __future__ import annotations

import re

from etils import epath

from avcl_jax.errors import UserError

PREFIX = "hf://"
_FORM = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?")
_FILES = ("config.json", "model.safetensors")


def fetch(url: str) -> epath.Path:
    """Returns the local directory of `hf://USER/REPO[@REVISION][/FOLDER]`.

    Only the files of encoders are fetched; the library keeps them, and works offline with those
    that it has.

    Raises:
        UserError: if the library is not installed, or cannot fetch it.
    """
    match = _FORM.fullmatch(url.rstrip("/"))
    if match is None:
        raise UserError(f"{url} is not hf://USER/REPO, hf://USER/REPO/FOLDER or …REPO@REVISION/…")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"{url} needs huggingface_hub: pip install huggingface-hub, or the extra avcl-jax[hub]"
        ) from error
    folder = f"{match['folder']}/" if match["folder"] else ""
    try:
        root = huggingface_hub.snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=[f"{folder}*{name}" for name in _FILES],
        )
    except (OSError, ValueError) as error:  # of the network, of the Hub, and of a wrong name
        raise UserError(f"{url} cannot be fetched: {str(error).strip().splitlines()[0]}") from error
    directory = epath.Path(root) / folder
    if not directory.is_dir():
        raise UserError(f"{url}: the repository has no encoder in a folder {match['folder']}")
    return directory
