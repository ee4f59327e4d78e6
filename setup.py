"""Package of avcl-jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_LINES = Path(__file__).with_name("requirements.txt").read_text().splitlines()

setup(
    name="avcl-jax",
    version="0.1.0",
    description="Audio-visual contrastive learning with temporal self-supervision, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["avcl_jax*", "data_prep*", "configs*"]),
    extras_require={
        "interop": ["tensorflow>=2.21.0"],
        "torch": ["torch>=2.13.0"],
        "beam": ["apache-beam>=2.77.0"],
        "s3": ["s3fs"],
        "scenes": ["scenedetect"],
        # Every JAX names the libtpu that matches it; requirements-tpu-aot.txt has the one tested.
        "tpu-aot": ["jax[tpu]"],
    },
    # requirements.txt pins what was tested; a library must leave its users room to move.
    install_requires=[
        re.sub(r"==([\w.]+)", r">=\1", line) for line in _LINES if line and line[0] != "#"
    ],
)
