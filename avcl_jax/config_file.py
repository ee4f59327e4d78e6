"""Config file and overrides of a command line, checked before they are used.

`ml_collections` raises KeyErrors of one bare word for unknown settings, and wraps what a config
file raises into pages of text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from avcl_jax import experiment
from avcl_jax.errors import UserError

_CONFIGS = Path(__file__).resolve().parent / "configs"
_BOOLEANS = ("true", "t", "1", "false", "f", "0")  # as absl reads them


def check_arguments(argv: Sequence[str], parse: Callable[[str], Any]) -> None:
    """Checks that the config file exists and has every setting that an argument overrides.

    Args:
        parse: returns the config of FILE or FILE:PRESET.

    Raises:
        UserError: naming the file or the setting, and those that are nearest to it.
    """
    names = [name for *_, name in _configs(argv)]
    if not names:
        return
    if len(names) > 1:
        raise UserError(
            f"--config is given {len(names)} times, {' and '.join(names)}: give it once"
        )
    config = _load(names[0], parse)
    for setting, value in overrides(argv).items():
        _check_setting(names[0], config, setting, value)


def overrides(argv: Sequence[str]) -> dict[str, str | None]:
    """Returns the value of each override; None where it is the next argument, or has none."""
    matches = (re.match(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument) for argument in argv)
    return {override[1]: override[2] for override in matches if override}


def with_files(argv: Sequence[str]) -> list[str]:
    """Names the files of this package for configs that are not found: configs/pretrain.py."""
    changed = list(argv)
    for place, flag, name in _configs(argv):
        changed[place] = flag + _with_file(name)
    return changed


def _with_file(name: str) -> str:
    file, colon, preset = name.partition(":")
    ours = _CONFIGS.parent / file
    found = not Path(file).is_file() and ours.parent == _CONFIGS and ours.is_file()
    return f"{ours}{colon}{preset}" if found else name


def _configs(argv: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yields the number of each argument that names a config, its flag up to "=", and the name."""
    for place, argument in enumerate(argv):
        if found := re.match(r"(--?config=)(.*)", argument):
            yield place, found[1], found[2]
        elif argument in ("--config", "-config") and place + 1 < len(argv):
            yield place + 1, "", argv[place + 1]


def _load(name: str, parse: Callable[[str], Any]) -> ml_collections.ConfigDict:
    file = name.partition(":")[0]
    path = _with_file(name)
    if not Path(path.partition(":")[0]).is_file():
        known = [str(path.relative_to(_CONFIGS.parent)) for path in sorted(_CONFIGS.glob("*.py"))]
        near = difflib.get_close_matches(file, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see the files in {_CONFIGS}"
        raise UserError(f"--config={name}: there is no file {file or 'in it'}; {hint}")
    if not file.endswith(".py"):
        raise UserError(f"--config={name}: a config is a Python file, see those in {_CONFIGS}")
    try:
        return parse(path)
    except (UserError, AttributeError) as error:
        # The parser raises the type that the file raised, with a traceback for its message.
        cause = error.__context__ or error
        problem = None
        if isinstance(cause, UserError):
            problem = str(cause)
        elif isinstance(cause, AttributeError) and cause.name == "get_config":
            problem = f"{file} has no get_config, so it is not a config"
        if problem:
            raise UserError(f"--config={name}: {problem}") from error
        raise


def _check_setting(
    name: str, config: ml_collections.ConfigDict, setting: str, value: str | None
) -> None:
    section: Any = config
    for part in setting.split("."):
        if not isinstance(section, ml_collections.ConfigDict) or part not in section:
            near = _nearest(config, section, setting)
            raise UserError(
                f"--config.{setting}: {name} has no such setting; {near} (--print_config lists all)"
            )
        section = section[part]
    if isinstance(section, ml_collections.ConfigDict) and value and not value.startswith("{"):
        first = next(iter(section), "NAME")
        raise UserError(
            f"--config.{setting}={value}: {setting} is a section of {', '.join(section)}: "
            f"override one of these, as --config.{setting}.{first}=VALUE"
        )
    if isinstance(section, bool) and value is not None and value.lower() not in _BOOLEANS:
        raise UserError(f"--config.{setting}={value} must be true or false")


def _nearest(config: ml_collections.ConfigDict, section: Any, setting: str) -> str:
    """Names settings that may have been meant, or those of the section that lacks it."""
    place, _, last = setting.rpartition(".")
    parts = [known.rpartition(".") for known in experiment.flatten(config.to_dict())]
    # Compared without their sections, which would make all settings of one section alike.
    close = difflib.get_close_matches(last, [name for *_, name in parts], n=1, cutoff=0.7)
    meant = [part for part in parts if part[2] in close]
    if near := [part for part in meant if part[0] == place] or meant:
        return f"did you mean {' or '.join(map(''.join, near[:3]))}?"
    where = section if isinstance(section, ml_collections.ConfigDict) else config
    return f"there are {', '.join(sorted(where))}"
