"""Self-supervised audio-visual representation learning in JAX; see README.md."""

import os

# Where TensorFlow happens to be installed, etils would read object stores through it, which cannot
# s3:// and loads all of it in every worker. To have that nevertheless, set this to 1.
os.environ.setdefault("EPATH_USE_TF", "0")

from avcl_jax.export.encoder import Encoder, load_encoder
from avcl_jax.weights import encoders

__all__ = ["Encoder", "encoders", "load_encoder"]
