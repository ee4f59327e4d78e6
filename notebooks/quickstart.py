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
# # avcl-jax in ten minutes
#
# From a handful of videos to encoders that know motion and sound, without a label: install, make
# and prepare the demo videos, pretrain for a few minutes, look at what the network sees and at
# what the feature bank returns, embed, retrieve.
#
# Audio-visual contrastive learning with temporal self-supervision after Jenni, Black and
# Collomosse (AAAI 2023).

# %% [markdown]
# ## Install
# On a plain Colab runtime this cell clones and installs the project; in a checkout it finds it.

# %%
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("AVCL_JAX_REPOSITORY", "https://github.com/avcl-jax/avcl-jax")
ROOT = next(
    (
        p
        for p in (Path.cwd(), *Path.cwd().parents, Path.cwd() / "avcl-jax")
        if (p / "avcl_jax" / "main.py").exists()
    ),
    None,
)
if ROOT is None:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "avcl-jax"], check=True)
    ROOT = Path.cwd() / "avcl-jax"
    # What Colab's Python already has may be newer than what requirements.txt pins: take ranges.
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(ROOT)], check=True)
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
        "runtime (Runtime > Restart session), then run this cell again"
    )
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

# %% [markdown]
# ## Prepare
# Any folder of videos works: `avcl-data prepare FOLDER --out RECORDS`. Here the demo's
# own generator writes MP4 files first: objects of five materials (heard) in five motions (seen).

# %%
SMALL = bool(int(os.environ.get("AVCL_JAX_SMALL", "0")))  # the tests run this notebook small
OUT = Path(os.environ.get("AVCL_JAX_OUT", "."))
DATA, RUN = OUT / "data" / "quickstart", OUT / "runs" / "quickstart"
VIDEOS, STEPS = (40, 20) if SMALL else (300, 600)


def run(*arguments: str) -> None:
    """Runs a command of the project and shows its last lines."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print("\n".join(done.stdout.splitlines()[-6:]))
    if done.returncode:
        raise RuntimeError(done.stdout)


run("avcl_jax.data_prep", "demo", f"--out={DATA}", f"--train={VIDEOS}", "--test=40", "--null=0")

# %% [markdown]
# ## What the network sees
# Two views of one video: each an interval of its timeline, played at 1, 2, 4 or 8 times the speed,
# forward or backward. The spectrogram covers exactly the seconds of the frames above it.

# %%
import matplotlib.pyplot as plt
import numpy as np

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords

config = pretrain.get_config()
spec = experiment.render_spec(config)
train = UsableRecords(RecordDataset(DATA / "records", "train"), spec)
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
# The main job of the project, with fewer steps. It writes checkpoints and metrics to `RUN`, and
# started again it goes on from there.

# %%
overrides = [
    f"--config.steps={STEPS}",
    f"--config.data.directory={DATA / 'records'}",
    f"--config.optimizer.warmup_steps={STEPS // 10}",
    f"--config.bank.warmup_steps={STEPS // 5}",
]
if SMALL:
    overrides += ["--config.global_batch_size=16", "--config.bank.size=320"]
run("avcl_jax.main", "--config=configs/pretrain.py", f"--workdir={RUN}", *overrides)

# %%
import json

rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
for name in ("vv/loss", "va/loss", "aa/loss"):
    left.plot([r["step"] for r in rows], [r[name] for r in rows], marker=".", label=name)
for name in ("speed_audio", "direction_audio", "order_vv", "order_aa"):
    key = f"{name}/accuracy"
    right.plot([r["step"] for r in rows], [r[key] for r in rows], marker=".", label=name)
left.set_title("contrastive losses")
right.set_title("accuracy of temporal tasks")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.set_xlabel("step")
plt.show()

# %% [markdown]
# ## What the bank returns
# For each anchor the feature bank offers past videos as further positives: those most similar in
# video *and* audio, less what all views of their speed and direction have in common. Labels are not
# used in training; here they show how sensible the positives are. "2× backward" is how the view in
# the bank was played.

# %%
from avcl_jax.configs import evaluate
from avcl_jax.evaluation.exhibits import bank_searches, open_bank
from avcl_jax.export.runs import config_of_run

trained = config_of_run(RUN)
trained.evaluation = evaluate.get_config().evaluation
for searches in bank_searches(trained, *open_bank(trained, RUN, spec, step=STEPS)).values():
    for samples, _ in searches:
        positives = "; ".join(row.labels for row in samples if row.kind == "positive")
        print(f"{samples[0].labels:32s} <- {positives}")

# %% [markdown]
# ## Embed and retrieve
# Export the encoders, load them as anyone would in a pipeline of their own, and look for the videos
# whose motion is most like that of a query.

# %%
run("avcl_jax.main", "--config=configs/export.py", f"--workdir={RUN}")

# %%
from avcl_jax.data.images import decode_jpegs
from avcl_jax.export import load_encoder

encoder = load_encoder(RUN / "export" / "video")
test = RecordDataset(DATA / "records", "test")
frames = [decode_jpegs(test[index].frames) for index in range(12 if SMALL else 40)]
features = np.stack([np.asarray(encoder(clip, 16.0)).mean(axis=0) for clip in frames])
features -= features.mean(axis=0)
features /= np.linalg.norm(features, axis=1, keepdims=True)
scores = features @ features.T
np.fill_diagonal(scores, -1)
names = test.class_names
figure, axes = plt.subplots(4, 4, figsize=(11, 6), layout="constrained")
for query, row in enumerate(axes):
    shown = [query, *np.argsort(-scores[query])[:3]]
    for column, (axis, index) in enumerate(zip(row, shown, strict=True)):
        axis.imshow(np.concatenate(list(frames[index][8:40:8]), axis=1))
        motion = names["motion"][test[index].labels["motion"]]
        axis.set_title(("query: " if column == 0 else "") + motion, fontsize=9)
        axis.set_axis_off()
plt.show()
