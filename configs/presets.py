"""Choice of a preset by its name, as `--config=FILE:NAME` gives it."""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from avcl_jax.errors import UserError


def choose(
    name: str, *presets: Callable[[], ml_collections.ConfigDict]
) -> ml_collections.ConfigDict:
    """Returns the config, locked, of the preset of that name, which is its function's.

    Raises:
        UserError: if there is none; it names those that there are.
    """
    by_name = {preset.__name__: preset for preset in presets}
    if name not in by_name:
        raise UserError(f"unknown preset {name!r}: use one of {', '.join(by_name)}")
    config = by_name[name]()
    config.lock()
    return config
