"""Package of avcl-jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent
_REPOSITORY = "https://github.com/avcl-jax/avcl-jax"
# Releases that lack what the code calls: PyAV 19 opens no file with metadata_errors.
_BELOW = {"av": "19"}
_DATA = ("css", "html", "js", "json", "md", "safetensors", "stablehlo")  # of any folder


def _requirements() -> list[str]:
    """Returns ranges from requirements.txt, which pins what was tested: users need room to move."""
    return [
        re.sub(r"==([\w.]+)", r">=\1", line)
        + (f",<{below}" if (below := _BELOW.get(line.partition("==")[0])) else "")
        for line in (_ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]


def _description() -> str:
    """Returns the README with absolute links, as a package index shows it."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith((".png", ".webp")) else "blob"
        return f"]({_REPOSITORY}/{kind}/main/{match[1]})"

    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


setup(
    name="avcl-jax",
    version="0.1.0",
    description="Finds copies of videos, embeds media, trains audio-visual encoders; in JAX",
    long_description=_description(),
    long_description_content_type="text/markdown",
    author="The avcl-jax developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Source": _REPOSITORY,
        "Changelog": f"{_REPOSITORY}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2302.07702",
    },
    keywords="jax flax self-supervised audio-visual video representation fingerprinting duplicates",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["avcl_jax*"]),
    package_data={"avcl_jax": ["py.typed", *(f"**/*.{suffix}" for suffix in _DATA)]},
    extras_require={
        "interop": ["tensorflow>=2.21.0"],
        "torch": ["torch>=2.13.0"],
        "beam": ["apache-beam>=2.77.0"],
        "s3": ["s3fs"],
        "hub": ["huggingface-hub>=2.4.0"],
        "scenes": ["scenedetect"],
        "mteb": ["mteb>=2.26.24"],
        # Every JAX names the libtpu that matches it; requirements-tpu-aot.txt has the one tested.
        "tpu-aot": ["jax[tpu]"],
        "gpu-aot": ["jax-cuda12-plugin"],
    },
    entry_points={
        "console_scripts": [
            "avcl-data=avcl_jax.data_prep.__main__:main",
            "avcl-embed=avcl_jax.embed.command:main",
            "avcl-fingerprint=avcl_jax.fingerprint.command:main",
        ]
    },
    install_requires=_requirements(),
)
