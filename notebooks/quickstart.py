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
# # avcl-jax in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/avcl-jax/avcl-jax/blob/main/notebooks/quickstart.ipynb)
#
# Encoders that come with the package recognise motion and materials in the first minute. Then we
# train such encoders from scratch, without a label, and look at what training sees. Runs in
# about three minutes on 2 CPU cores, installation apart; nothing but the package is downloaded.

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
# ## The first minute: features of videos
# Some videos to work with: a generator renders MP4 files of objects of five materials (heard) in
# five motions (seen), and prepares the records that training will use below.

# %% language="bash"
# avcl-data demo --out demo --train 200 --test 60 --null 0

# %%
import csv

import numpy as np

from avcl_jax import load_encoder
from avcl_jax.data.media import decode_media

with open("demo/media/manifest.csv") as table:
    rows = list(csv.DictReader(table))
media = [
    decode_media(f"demo/media/{row['path']}", short_side=64, max_fps=16.0, sample_rate_hz=16_000)
    for row in rows
]

# %% [markdown]
# `load_encoder` takes the name of an encoder that comes with the package, or the folder of one that
# you have trained. The encoder takes frames or a waveform of any length and rate, and returns one
# vector per clip of 0.75 s. No label was used to train it; here a linear classifier learns the
# labels of 200 videos from the mean vectors, and names those of the other 60.

# %%
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

is_test = np.array([row["split"] == "test" for row in rows])
truth = {name: np.array([row[f"label_{name}"] for row in rows]) for name in ("motion", "material")}


def probe(encoder_pair):
    """Returns motion (from video) and material (from audio) of the test videos, as predicted."""
    video, audio = (load_encoder(f"{encoder_pair}/{name}") for name in ("video", "audio"))
    features = {
        "motion": [video(m.frames, m.fps).mean(axis=0) for m in media],
        "material": [audio(m.waveform, m.sample_rate_hz).mean(axis=0) for m in media],
    }
    predicted = {}
    for name, values in features.items():
        values = np.stack(values)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        classifier.fit(values[~is_test], truth[name][~is_test])
        predicted[name] = classifier.predict(values[is_test])
        correct = np.mean(predicted[name] == truth[name][is_test])
        print(f"{name} from {encoder_pair}: {correct:.0%} right, chance 20 %")
    return predicted


predicted = probe("small")

# %% [markdown]
# The first twelve test videos, as they are named: red where motion or material is wrong.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(4, 3, figsize=(11, 4.6), layout="constrained")
for place, axis in enumerate(axes.flat):
    number = np.flatnonzero(is_test)[place]
    axis.imshow(np.concatenate(list(media[number].frames[8:40:8]), axis=1))
    names = [values[place] for values in predicted.values()]
    right = [values[number] for values in truth.values()]
    color = "black" if names == right else "firebrick"
    axis.set_title(" and ".join(names), fontsize=9, color=color)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# The other notebooks: [features of your own videos][own_videos] as a table, [copies of
# clips][fingerprint] in a library, and [encoders in your own training][downstream], in JAX and
# PyTorch. The rest of this one is about training without labels.
#
# [own_videos]: https://github.com/avcl-jax/avcl-jax/blob/main/notebooks/own_videos.ipynb
# [fingerprint]: https://github.com/avcl-jax/avcl-jax/blob/main/notebooks/fingerprint.ipynb
# [downstream]: https://github.com/avcl-jax/avcl-jax/blob/main/notebooks/downstream.ipynb

# %% [markdown]
# ## What training sees
# Two views of one video: each an interval of its timeline, played at 1, 2, 4 or 8 times the speed,
# forward or backward. The spectrogram covers exactly the seconds of the frames above it.

# %%
from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords

config = pretrain.get_config()
spec = experiment.render_spec(config)
train = UsableRecords(RecordDataset("demo/records", "train"), spec)
batch = next(iter(train_batches(train, spec, seed=0, global_batch_size=8)))
speeds, directions = config.views.speeds, ("forward", "backward")
figure, axes = plt.subplots(4, 2, figsize=(11, 7), layout="constrained")
for video in range(2):
    for view in range(2):
        clip = batch["video"][video, view]
        title = f"{speeds[batch['video_speed'][video, view]]}x "
        title += directions[batch["video_direction"][video, view]]
        top, bottom = axes[2 * video, view], axes[2 * video + 1, view]
        top.imshow(np.concatenate(list(clip[::2]), axis=1))
        top.set_title(f"video {video + 1}, view {view + 1}: {title}", fontsize=10)
        bottom.imshow(batch["spectrogram"][video, view].T, origin="lower", aspect="auto")
        for axis in (top, bottom):
            axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Pretrain
# The program that trains at any size, here for 400 steps. It writes checkpoints and metrics to its
# workdir, and resumes from there when it is started again.

# %% language="bash"
# export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # faster on CPUs, under Linux
# python -m avcl_jax.main --config=configs/pretrain.py --workdir=run \
#     --config.data.directory=demo/records --config.steps=400 \
#     --config.optimizer.warmup_steps=40 --config.bank.warmup_steps=80

# %%
import json

with open("run/metrics.jsonl") as lines:
    metrics = [json.loads(line) for line in lines]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
for name in ("vv/loss", "va/loss", "aa/loss"):
    left.plot([m["step"] for m in metrics], [m[name] for m in metrics], marker=".", label=name)
for name in ("speed_audio", "direction_audio", "order_vv", "order_aa"):
    values = [m[f"{name}/accuracy"] for m in metrics]
    right.plot([m["step"] for m in metrics], values, marker=".", label=name)
left.set_title("contrastive losses")
right.set_title("accuracy of temporal tasks")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.set_xlabel("step")
plt.show()

# %% [markdown]
# ## What the feature bank returns
# For each anchor the bank offers past videos as further positives: those most similar in video
# *and* audio, less what all views of their speed and direction have in common. Labels, which
# training does not use, show how sensible they are. "2× backward" is how a view was played.

# %%
from absl import logging

from avcl_jax.configs import evaluate
from avcl_jax.evaluation.exhibits import bank_searches, open_bank
from avcl_jax.export.runs import config_of_run

logging.set_verbosity(logging.ERROR)  # libraries log about themselves
trained = config_of_run("run")
trained.evaluation = evaluate.get_config().evaluation
searches = bank_searches(trained, *open_bank(trained, Path("run"), spec, step=400))
for samples, _ in [search for kind in searches.values() for search in kind]:
    positives = "; ".join(row.labels for row in samples if row.kind == "positive")
    print(f"{samples[0].labels:32s} <- {positives}")

# %% [markdown]
# ## What 400 steps are worth
# Export the encoders of the run, and use them as those above. `small` was trained for longer, and
# on more videos.

# %% language="bash"
# python -m avcl_jax.main --config=configs/export.py --workdir=run

# %%
own = probe("run/export")

# %% [markdown]
# `make demo` in a clone of the repository runs the same in full, with all evaluations and a report.
