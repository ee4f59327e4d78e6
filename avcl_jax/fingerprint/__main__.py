"""`python -m avcl_jax.fingerprint`, which `avcl-fingerprint` is short for."""

import sys

from avcl_jax.fingerprint.command import main

sys.exit(main())
