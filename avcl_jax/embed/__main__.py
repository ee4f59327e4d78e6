"""`python -m avcl_jax.embed`, which `avcl-embed` is short for."""

import sys

from avcl_jax.embed.command import main

sys.exit(main())
