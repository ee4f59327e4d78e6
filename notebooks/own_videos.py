# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own videos: prepare, embed, search
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/avcl-jax/avcl-jax/blob/main/notebooks/own_videos.ipynb)
#
# From a folder of media to a table of features, a search by similarity and a linear probe, and to
# records for training. Runs in about one minute on 2 CPU cores, installation apart; nothing but the
# package is downloaded.

# %% [markdown]
# ## Install

# %%
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("avcl_jax") is None:  # as in Colab
    source = os.environ.get("AVCL_JAX_SOURCE", "git+https://github.com/avcl-jax/avcl-jax")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
# Packages that this kernel has imported already keep their old version until it restarts.
stale = [
    name
    for name in ("numpy", "scipy", "jax", "jaxlib", "flax", "google.protobuf")
    if name in sys.modules
    and sys.modules[name].__version__ != importlib.metadata.version(name.split(".")[-1])
]
if stale:
    raise RuntimeError(
        f"this kernel has imported an older {', '.join(stale)} than is installed now: restart the "
        "kernel (in Colab: Runtime > Restart session), then run this cell again"
    )
# The commands of this environment, and a new folder for all files of this notebook.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.chdir(tempfile.mkdtemp(prefix="avcl-jax-"))
print("files are written to", Path.cwd())

# %% [markdown]
# ## A folder of media
# Anything that FFmpeg reads, in folders of any depth. To use your own, put its path into `VIDEOS`.
# Here 120 small videos are rendered, and a file is added that only has the name of a video.

# %% language="bash"
# set -e
# avcl-data foley --out rendered --train 0 --test 120
# mv rendered/test my_videos
# echo "not a video" > my_videos/broken.mp4

# %%
VIDEOS = os.environ["VIDEOS"] = "my_videos"

# %% [markdown]
# ## Embed
# One command to a table: one row per file and modality with `--per-file`, else one per clip, with
# its start and end. A file that cannot be read is listed with the reason, and the exit status is 1.
# The command can be stopped and started again.

# %% language="bash"
# avcl-embed "$VIDEOS" --out features.parquet --per-file || echo "exit status $?"

# %%
import numpy as np
import pyarrow.parquet

table = pyarrow.parquet.read_table("features.parquet").to_pylist()
print(len(table), "rows of", list(table[0]))


def unit_vectors(modality):
    """Returns the names of the files with a modality, and their vectors, centred, of length one."""
    rows = [row for row in table if row["modality"] == modality]
    vectors = np.array([row["vector"] for row in rows])
    vectors -= vectors.mean(axis=0)
    return [row["id"] for row in rows], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# %% [markdown]
# ## Search
# The files that look, or sound, most like a query: the largest products of its vector with others.


# %%
def most_similar(modality, query, count=4):
    """Returns the names of the files that are most similar to a query, which is the first."""
    names, vectors = unit_vectors(modality)
    similarity = vectors @ vectors[names.index(query)]
    return [names[n] for n in np.argsort(-similarity)[:count]]


query = unit_vectors("video")[0][0]
print("looks like:", most_similar("video", query))
print("sounds like:", most_similar("audio", query))

# %%
import matplotlib.pyplot as plt

from avcl_jax.data.media import decode_frames, decode_media

figure, axes = plt.subplots(2, 4, figsize=(12, 3.6), height_ratios=(1, 2), layout="constrained")
for axis, name in zip(axes[0], most_similar("video", query), strict=True):
    frames = decode_frames(f"{VIDEOS}/{name}", short_side=64, max_fps=2, end_seconds=2)
    axis.imshow(np.concatenate([frame.image for frame in frames], axis=1))
    axis.set_title(("query: " if name == query else "looks alike: ") + name, fontsize=8)
    axis.set_axis_off()
for axis, name in zip(axes[1], most_similar("audio", query), strict=True):
    media = decode_media(
        f"{VIDEOS}/{name}", short_side=64, max_fps=2, sample_rate_hz=16_000, end_seconds=4
    )
    axis.specgram(media.waveform / 32768 + 1e-6, NFFT=512, Fs=16_000, noverlap=256, vmin=-110)
    axis.set_title(("query: " if name == query else "sounds alike: ") + name, fontsize=8)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## A linear probe
# With labels for some files, a linear classifier on the features labels the rest. The rendered
# videos have a motion that is seen and a material that is heard; it learns from half of them.

# %%
import csv

from sklearn.linear_model import LogisticRegression

with open("rendered/manifest.csv") as file:
    labels = {Path(row["path"]).name: row for row in csv.DictReader(file)}
for modality, label in (("video", "label_motion"), ("audio", "label_material")):
    names, vectors = unit_vectors(modality)
    classes = [labels[name][label] for name in names]
    half = len(names) // 2
    probe = LogisticRegression(C=10.0, max_iter=1000).fit(vectors[:half], classes[:half])
    print(f"{label} from {modality}: {probe.score(vectors[half:], classes[half:]):.0%} right")

# %% [markdown]
# ## Prepare, to train on them
# Training reads records: frames as JPEG and audio as PCM, in shards that TensorFlow Datasets can
# open. `inspect` writes an image of them.

# %% language="bash"
# avcl-data prepare "$VIDEOS" --out records || echo "exit status $?"
# avcl-data inspect records --rows 3

# %%
from IPython.display import Image

Image("records/card.png", width=900)

# %% [markdown]
# Training on them is one command, which runs for hours on real videos:
#
#     python -m avcl_jax.main --config=configs/pretrain.py:records --config.data.directory=records
#
# `avcl-embed` then takes its workdir as `--encoder`. Settings, larger encoders and accelerators:
# [train your own encoders][train].
#
# [train]: https://github.com/avcl-jax/avcl-jax/blob/main/docs/train.md
