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
# # Fingerprint a library: where does this clip come from?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/avcl-jax/avcl-jax/blob/main/notebooks/fingerprint.ipynb)
#
# An index of a folder of videos, the sources of clips that were cropped, captioned or dubbed, and
# the duplicates inside the library. Runs in about one minute on 2 CPU cores, installation apart;
# nothing but the package is downloaded.

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
# ## A library, and clips of it
# Any folder of media will do: put its path into the first command below. Here 60 videos of 10 s are
# rendered, and five clips are cut from them and changed; a sixth has no source in the library.

# %% language="bash"
# set -e
# avcl-data foley --out rendered --train 1 --test 60
# mv rendered/test library

# %%
import dataclasses

import cv2
import numpy as np

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import decode_media


def cut(path, begin, end):
    """Decodes an interval of a video, in seconds."""
    interval = {"start_seconds": begin, "end_seconds": end}
    return decode_media(path, short_side=None, max_fps=None, sample_rate_hz=16_000, **interval)


def write_clip(name, media, change=lambda frame: frame):
    """Encodes a clip with changed frames, as small as a messenger would."""
    frames = zip(media.frame_seconds, map(change, media.frames), strict=True)
    path = Path("clips", f"{name}.mp4")
    rates = {"fps": media.fps, "sample_rate_hz": 16_000, "audio_bits_per_second": 24_000}
    write_mp4(path, frames, media.waveform, video_options={"crf": "34"}, **rates)


def captioned(frame):
    """Writes over the lower part of a frame."""
    height, width = frame.shape[:2]
    frame = cv2.rectangle(frame.copy(), (0, height * 3 // 4), (width, height), (0, 0, 0), -1)
    place = (2, height - height // 12)
    return cv2.putText(frame, "part 2 of 3", place, 0, width / 220, (255, 255, 255), 1)


library = sorted(Path("library").glob("*.mp4"))
Path("clips").mkdir()
write_clip("excerpt", cut(library[3], 2, 6))
write_clip("cropped", cut(library[8], 1, 6), lambda frame: frame[8:-8, 8:-8])
write_clip("captioned", cut(library[15], 3, 8), captioned)
write_clip("mirrored", cut(library[21], 4, 9), lambda frame: frame[:, ::-1])
dubbed = dataclasses.replace(cut(library[30], 0, 6), waveform=cut(library[31], 3, 9).waveform)
write_clip("dubbed", dubbed)
write_clip("unknown", cut(next(Path("rendered/train").glob("*.mp4")), 1, 6))

# %% [markdown]
# ## Index the library, and ask
# The encoders come with the package. The first query of a machine compiles them, later ones reuse
# that.

# %% language="bash"
# avcl-fingerprint index library --index library.index

# %% language="bash"
# avcl-fingerprint query clips --index library.index --count 2

# %% [markdown]
# A score of 2 means that one unrelated clip in a hundred finds as much in this index, 6 one in a
# million; 2.5 is a match. For the dubbed clip video and audio come from two videos: both are named,
# with what matches. The same as JSON, one object per line and clip, and where each clip begins:

# %% language="bash"
# avcl-fingerprint query clips --index library.index --json > answers.jsonl

# %%
import json

import matplotlib.pyplot as plt

with open("answers.jsonl") as lines:
    answers = [json.loads(line) for line in lines]
figure, axes = plt.subplots(len(answers), 2, figsize=(8, 1.2 * len(answers)), layout="constrained")
for (left, right), answer in zip(axes, answers, strict=True):
    match = answer["matches"][0]
    offset = match["offset_seconds"]
    source = cut(match["path"], offset, offset + 2 * match["rate"])
    for axis, media in ((left, cut(answer["query"], 0, 2)), (right, source)):
        axis.imshow(np.concatenate(list(media.frames[::8][:4]), axis=1))
        axis.set_axis_off()
    left.set_title(f"{Path(answer['query']).stem}: {answer['verdict']}", fontsize=9)
    named = f"{Path(match['source']).stem} from {offset:.2f} s, score {match['score']:.1f}"
    matched = f"by {' and '.join(match['matched'])}" if match["accepted"] else "not accepted"
    right.set_title(f"{named}, {matched}", fontsize=9)
plt.show()
# %% [markdown]
# ## Duplicates inside the library
# All pairs that share video or audio, and what matched. The clips are added to the library first.
# Nothing is deleted; `duplicates.html` in the folder above shows the pairs side by side.

# %% language="bash"
# set -e
# avcl-fingerprint add clips --index library.index
# avcl-fingerprint duplicates --index library.index --report duplicates.html

# %% [markdown]
# `avcl-fingerprint serve --index library.index` shows the same in a web page on your machine: drop
# a clip, see and hear the match. Limits, scores and measurements: [fingerprinting][page].
#
# [page]: https://github.com/avcl-jax/avcl-jax/blob/main/docs/fingerprint.md
