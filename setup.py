"""Package of avcl-jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Releases that lack what the code calls: PyAV 19 opens no file with metadata_errors.
_BELOW = {"av": "19"}
_LINES = Path(__file__).with_name("requirements.txt").read_text().splitlines()

setup(
    name="avcl-jax",
    version="0.1.0",
    description="Audio-visual contrastive learning with temporal self-supervision, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["avcl_jax*"]),
    package_data={
        "avcl_jax": ["style.css"],
        "avcl_jax.fingerprint.web": ["static/*"],
        "avcl_jax.weights": ["*/*.md", "*/*/*"],
    },
    extras_require={
        "interop": ["tensorflow>=2.21.0"],
        "torch": ["torch>=2.13.0"],
        "beam": ["apache-beam>=2.77.0"],
        "s3": ["s3fs"],
        "fingerprint": ["faiss-cpu>=1.15.1", "starlette>=1.10.0", "uvicorn>=0.54.0"],
        "scenes": ["scenedetect"],
        # Every JAX names the libtpu that matches it; requirements-tpu-aot.txt has the one tested.
        "tpu-aot": ["jax[tpu]"],
    },
    # requirements.txt pins what was tested; a library must leave its users room to move.
    entry_points={
        "console_scripts": [
            "avcl-data=avcl_jax.data_prep.__main__:main",
            "avcl-fingerprint=avcl_jax.fingerprint.command:main",
        ]
    },
    install_requires=[
        re.sub(r"==([\w.]+)", r">=\1", line)
        + (f",<{below}" if (below := _BELOW.get(line.partition("==")[0])) else "")
        for line in _LINES
        if line and line[0] != "#"
    ],
)
