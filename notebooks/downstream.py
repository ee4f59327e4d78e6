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
# # Downstream: encoders in your own training, in JAX and in PyTorch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/avcl-jax/avcl-jax/blob/main/notebooks/downstream.ipynb)
#
# An exported encoder is a pure function with parameters: here it is a frozen feature, a network to
# fine-tune with Flax and optax, and a state dict for torchvision. Runs in about two minutes on 2
# CPU cores, installation apart; nothing but the package is downloaded.

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
# ## Clips with labels
# Rendered videos with five kinds of motion, 200 to train on and 100 to test. `preprocess` cuts the
# frames of a video of any length, rate and size into the clips that the encoder takes.

# %% language="bash"
# avcl-data foley --out media --train 200 --test 100

# %%
import csv

import jax
import numpy as np

from avcl_jax import load_encoder
from avcl_jax.data.media import decode_media

encoder = load_encoder("small/video")
with open("media/manifest.csv") as table:
    rows = list(csv.DictReader(table))
classes = sorted({row["label_motion"] for row in rows})


def load(split):
    """Returns four clips of each video, uint8 [videos, 4, time, height, width, 3], and labels."""
    chosen = [row for row in rows if row["split"] == split]
    clips = []
    for row in chosen:
        path = f"media/{row['path']}"
        media = decode_media(path, short_side=64, max_fps=16.0, sample_rate_hz=16_000)
        clips.append(encoder.preprocess(media.frames, media.fps)[1:12:3])
    labels = [classes.index(row["label_motion"]) for row in chosen]
    return np.stack(clips), np.array(labels)


train_clips, train_labels = load("train")
test_clips, test_labels = load("test")
print(classes, train_clips.shape, test_clips.shape)

# %% [markdown]
# ## Fine-tune with Flax and optax
# `encoder.module` is a Flax Linen module and `encoder.params` its variables. The classifier below
# trains them together with a new layer, or that layer alone, in an ordinary optax loop.

# %%
import flax.linen as nn
import jax.numpy as jnp
import optax

head = nn.Dense(len(classes))


def logits_of(encoder_variables, head_variables, clips, *, train):
    """Returns logits, and the encoder's variables with new running statistics."""
    inputs = encoder.preprocess.standardise(clips)
    outputs, changed = encoder.module.apply(
        encoder_variables, inputs, train=train, mutable=["batch_stats"]
    )
    return head.apply(head_variables, outputs["features"]), {**encoder_variables, **changed}


def accuracy_after_training(variables, *, frozen, steps=150, batch_size=32):
    """Trains on clips, and returns the accuracy on test videos: the mean logits of four clips."""
    width = encoder.apply(variables, train_clips[0]).shape[-1]
    head_variables = head.init(jax.random.key(0), jnp.zeros((1, width)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.02 if frozen else 0.002, steps))

    def loss_of(trained, variables, clips, labels):
        variables = variables if frozen else {**variables, "params": trained["encoder"]}
        logits, variables = logits_of(variables, trained["head"], clips, train=not frozen)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), variables

    @jax.jit
    def step(trained, state, variables, clips, labels):
        gradients, variables = jax.grad(loss_of, has_aux=True)(trained, variables, clips, labels)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, variables

    trained = {"head": head_variables} | ({} if frozen else {"encoder": variables["params"]})
    state = optimizer.init(trained)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        videos = rng.integers(len(train_clips), size=batch_size)
        clips = train_clips[videos, rng.integers(4, size=batch_size)]
        trained, state, variables = step(trained, state, variables, clips, train_labels[videos])
    variables = variables if frozen else {**variables, "params": trained["encoder"]}
    predict = jax.jit(lambda clips: logits_of(variables, trained["head"], clips, train=False)[0])
    logits = np.mean([predict(test_clips[:, n]) for n in range(4)], axis=0)
    return float(np.mean(logits.argmax(axis=1) == test_labels))


scratch = encoder.module.init(jax.random.key(1), jnp.zeros((1, *encoder.input_shape)), train=False)
print(f"chance            {1 / len(classes):.0%}")
print(f"frozen features   {accuracy_after_training(encoder.params, frozen=True):.0%}")
print(f"fine-tuned        {accuracy_after_training(encoder.params, frozen=False):.0%}")
print(f"from scratch      {accuracy_after_training(scratch, frozen=False):.0%}")

# %% [markdown]
# The protocols with confidence intervals, official folds and the same for audio are one command
# each: `python -m avcl_jax.main --config=configs/finetune.py` and [others][protocols].
#
# [protocols]: https://github.com/avcl-jax/avcl-jax/blob/main/docs/protocols.md

# %% [markdown]
# ## PyTorch, under torchvision's names
# Networks with a published name go both ways. The cells below need PyTorch and torchvision, and are
# skipped without: `pip install torch torchvision`. The weights are random here, because nothing is
# downloaded: use those of a file such as torchvision's `r2plus1d_18-91a641e6.pth`.

# %%
if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    import torch
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.video.r2plus1d_18(weights=None).eval()
    torch.save(network.state_dict(), "r2plus1d_18.pth")
else:
    torch = None
    print("PyTorch is not installed: the rest of this notebook is skipped")

# %% [markdown]
# Import: the checkpoint becomes an encoder like any other.

# %% language="bash"
# test -e r2plus1d_18.pth || exit 0
# python -m avcl_jax.main --config=configs/import_weights.py:torchvision,r2plus1d_18 \
#     --config.checkpoint=r2plus1d_18.pth --workdir=imported

# %%
if torch:
    imported = load_encoder("imported/export/video")
    clips = imported.preprocess(np.repeat(test_clips[0, 0], 2, axis=0), 16.0)[:1]
    ours = np.asarray(jax.jit(imported.apply)(imported.params, clips))
    network.fc = torch.nn.Identity()
    # Ours standardises colours itself, by the mean and deviation that torchvision documents.
    inputs = (clips / 255 - imported.module.channel_mean) / imported.module.channel_std
    with torch.no_grad():
        theirs = network(torch.tensor(inputs).float().permute(0, 4, 1, 2, 3)).numpy()
    print("features", ours.shape, "differ by at most", np.abs(ours - theirs).max())

# %% [markdown]
# Export: an encoder of ours, after any training, as a state dict for torchvision's network.

# %% language="bash"
# test -e imported || exit 0
# python -m avcl_jax.main --config=configs/export.py:torchvision \
#     --config.encoder=imported/export/video --workdir=imported

# %%
if torch:
    import safetensors.torch

    again = torchvision.models.video.r2plus1d_18(weights=None)
    again.fc = torch.nn.Identity()
    print(again.load_state_dict(safetensors.torch.load_file("imported/torchvision.safetensors")))
