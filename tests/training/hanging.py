"""Runs `avcl_jax.main`; in process 1 its JPEG decoder does not return from its 400th call."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any
from unittest import mock

import simplejpeg
from absl import app

from avcl_jax import main

_calls = itertools.count(1)
_decode = simplejpeg.decode_jpeg


def decode(*args: Any, **options: Any) -> Any:
    """Decodes, or waits for ever."""
    if next(_calls) >= 400 and "--process_id=0" not in sys.argv:
        threading.Event().wait()
    return _decode(*args, **options)


if __name__ == "__main__":
    with mock.patch.object(simplejpeg, "decode_jpeg", decode):
        app.run(main.main, ["main", *sys.argv[1:]], flags_parser=main.parse_flags)
