"""The baseline in PyTorch computes what our pretraining step computes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data import augment
from avcl_jax.objectives import bank_sampling
from avcl_jax.objectives.bank_rows import BankRows, RowNumbers, presence_bits
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.objectives.views import MODALITIES
from avcl_jax.training import program
from avcl_jax.training.objective import CONTRASTIVE_TERMS
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine
from benchmarks.batches import random_batch

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (requirements-interop.txt)")

from benchmarks.baselines import pytorch_pretraining  # noqa: E402 (torch first)

KEY = jax.random.key(5)


def demo(*, clip_norm: float):
    """The demo without augmentation and with fewer videos."""
    config = pretrain.get_config("demo")
    off = {
        f"{section}.{name}": 0.0
        for section, names in {
            "photometric": ("brightness", "contrast", "saturation", "hue", "gray_probability"),
            "spectral": ("equalizer", "noise"),
        }.items()
        for name in names
    }
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "global_batch_size": 8,
                "spectral.mask_mels": 0,
                "optimizer.clip_norm": clip_norm,
                **off,
            }
        )
    return config


def batch_of(config):
    """Two videos of one source; some are in not every task."""
    batch = random_batch(config)
    batch["source_id"][1] = batch["source_id"][0]
    batch["record_index"] += 40
    for task in ("speed", "direction"):  # as the pipeline draws them for "shared"
        batch[f"audio_{task}"] = batch[f"video_{task}"]
    for number, task in enumerate(("speed", "direction", "order")):
        batch[f"{task}_mask"][number] = False
    batch["video_moves"][5] = False
    return batch


def full_bank(config, bank, batch):
    """A bank of random rows, some of the sources of the batch."""
    size, rng = config.bank.size, np.random.default_rng(1)
    rows = rng.normal(size=(2, size, config.model.embedding_dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    source = rng.integers(0, 60, size).astype(np.int32)
    playback = rng.integers(0, 2 * len(config.views.speeds), size).astype(np.int32)
    assert np.isin(source, batch["source_id"]).sum() > 10
    present = dict.fromkeys(MODALITIES, jnp.ones(size, bool))
    columns = np.asarray(bank.rows.numbers.columns).copy()
    columns[:, :4] = np.stack([np.arange(size), source, playback, playback], axis=1)
    rows = BankRows(
        embeddings={"video": jnp.asarray(rows[0]), "audio": jnp.asarray(rows[1])},
        presence=presence_bits(present),
        numbers=RowNumbers(jnp.asarray(columns)),
    )
    return FeatureBank(rows, jnp.asarray(size, jnp.int32))


def randomised(tree, seed: int, *, positive: bool = False):
    """Parameters in which no scale is 0, so that every branch has a gradient."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1:
            return leaf
        values = 0.3 * rng.standard_normal(leaf.shape) + 0.5
        return jnp.asarray(np.abs(values) + 0.1 if positive else values, jnp.float32)

    return jax.tree.map(draw, tree)


def as_torch(path: tuple[str, ...], value: np.ndarray, target) -> tuple[str, np.ndarray]:
    """Name and value of one of our parameters in PyTorch's network, whose shape is `target`'s."""
    *modules, last = path
    if modules[-1] == "norm":  # Flax's own, inside of our BatchNorm.
        modules.pop()
    names = [module for module in modules if module != "mlp"]
    kind = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    name = ".".join([*names, kind[last]])
    if last == "kernel":
        shape = target[name].shape
        if len(shape) == 4:
            outputs, inputs, *window = shape
            value = value.reshape(*window, inputs, outputs).transpose(3, 2, 0, 1)
        else:
            value = value.T
    return name, value


def converted(tree, target) -> dict[str, np.ndarray]:
    """One of our trees of parameters or statistics by PyTorch's names."""
    rows = [as_torch(path, np.asarray(v), target) for path, v in flatten_dict(tree).items()]
    assert len({name for name, _ in rows}) == len(rows)
    return dict(rows)


def our_noise(config, batch, step):
    """The Gumbel noise of our four draws for every row [4, anchors, rows] of a new bank."""
    key = jax.random.split(jax.random.fold_in(KEY, step))[1]
    view = 2 * np.repeat(batch["record_index"].astype(np.uint32), 2)
    view = jnp.asarray(view + np.tile(np.arange(2, dtype=np.uint32), len(view) // 2))
    insertion = jnp.broadcast_to(jnp.arange(config.bank.size), (len(view), config.bank.size))
    noise = [
        bank_sampling._gumbel(jax.random.fold_in(key, number), view, insertion)
        for number in range(sum(map(len, CONTRASTIVE_TERMS.values())))
    ]
    return torch.from_numpy(np.array(jnp.stack(noise)))


@pytest.mark.parametrize(
    ("clip_norm", "compiled"),
    [(5.0, False), (1e4, False), (5.0, True)],
    ids=["clipped", "not-clipped", "compiled"],
)
def test_a_step(clip_norm, compiled):
    """Every term, the gradient after clipping, running statistics, and the bank afterwards."""
    config = demo(clip_norm=clip_norm)
    batch = batch_of(config)
    _, init, step = program.build(config)
    state, _ = init(jax.random.key(0))
    number = config.bank.warmup_steps
    state = dataclasses.replace(
        state,
        step=jnp.asarray(number),
        params=randomised(state.params, 2),
        batch_stats=randomised(state.batch_stats, 3, positive=True),
        bank=full_bank(config, state.bank, batch),
    )
    after, metrics = jax.jit(step)(state, batch, KEY)
    assert float(metrics["vv/bank_positives"].compute()) > 1

    theirs = pytorch_pretraining.Pretraining(config, compiled=compiled)
    target = theirs.network.state_dict()
    ours = converted(state.params, target) | converted(state.batch_stats, target)
    theirs.network.load_state_dict({name: torch.tensor(value) for name, value in ours.items()})
    for rows, values in zip(theirs.bank.rows, bank_arrays(state.bank), strict=True):
        rows.copy_(torch.from_numpy(values))
    theirs.bank.inserted, theirs.steps = config.bank.size, number
    total, terms = theirs.step(
        pytorch_pretraining.to_tensors(batch), our_noise(config, batch, number)
    )

    assert set(terms) == {name for name, weight in config.loss.weights.items() if weight}
    for term, value in terms.items():
        assert float(value) > 0
        assert float(value) == pytest.approx(float(metrics[f"{term}/loss"].compute()), rel=1e-4)
    assert float(total) == pytest.approx(float(metrics["loss"].compute()), rel=1e-4)

    # Adam's first moment after its first step is this fraction of the gradient.
    (moment,) = (leaf.mu for leaf in adam_states(after.opt_state))
    fraction = 1 - config.optimizer.momentum
    expected = converted(jax.tree.map(lambda leaf: leaf / fraction, moment), target)
    found = {name: p.grad.numpy() for name, p in theirs.network.named_parameters()}
    assert found.keys() == expected.keys()
    norm = float(metrics["health/gradient_norm"].compute())
    assert (norm > clip_norm) == (clip_norm == 5.0)
    whole = min(norm, clip_norm)
    errors = {name: np.linalg.norm(found[name] - value) for name, value in expected.items()}
    assert np.linalg.norm(list(errors.values())) < 1e-4 * whole
    for name, value in expected.items():
        # Wider: one ReLU at its kink, on the other side by rounding, moves a small gradient.
        assert errors[name] < 1e-2 * np.linalg.norm(value), name

    buffers = dict(theirs.network.named_buffers())
    for name, value in converted(after.batch_stats, target).items():
        if name.endswith("mean"):
            np.testing.assert_allclose(buffers[name], value, atol=1e-4, rtol=1e-4, err_msg=name)
    for rows, values in zip(theirs.bank.rows, bank_arrays(after.bank), strict=True):
        np.testing.assert_allclose(rows, values, atol=1e-5)


def bank_arrays(bank):
    """Our bank as PyTorch's rows."""
    return (
        np.stack([bank.rows.embeddings[modality] for modality in MODALITIES]),
        np.asarray(bank.rows.numbers.source_id, np.int64),
        np.asarray(bank.rows.numbers.playback("video"), np.int64),
    )


def adam_states(state):
    return [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(leaf, optax.ScaleByAdamState)
    ]


def test_augmentation_by_the_same_draws():
    config = pretrain.get_config("demo")
    rng = np.random.default_rng(7)
    video = rng.random((3, 2, 4, 8, 8, 3), np.float32)
    keys = jax.random.split(KEY, 5)
    # Brightness, contrast, saturation, grey and hue, each from its key.
    draws = [
        jax.random.uniform(key, (3, 2, 1, 1, 1, 1), minval=0.0 if number == 3 else -1.0)
        for number, key in enumerate(keys)
    ]
    with config.unlocked():
        config.photometric.gray_probability = float(np.median(draws[3]))
    ours = augment.photometric(KEY, video, experiment.augmentation(config)[0])
    theirs = pytorch_pretraining.photometric(
        torch.from_numpy(video),
        torch.stack([torch.from_numpy(np.array(draw).reshape(3, 2)) for draw in draws]),
        config.photometric,
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-5)

    spectrogram = rng.normal(size=(3, 2, 48, 40)).astype(np.float32)
    settings = config.spectral
    keys = jax.random.split(KEY, 4)
    spectral = {
        "knots": jax.random.uniform(keys[0], (3, 2, settings.equalizer_knots), minval=-1.0),
        "width": jax.random.randint(keys[1], (3, 2, 1), 0, settings.mask_mels + 1),
        "first": jax.random.uniform(keys[2], (3, 2, 1)),
        "noise": jax.random.normal(keys[3], spectrogram.shape),
    }
    assert spectral["width"].max() > 0
    ours = augment.spectral(KEY, spectrogram, experiment.augmentation(config)[1])
    theirs = pytorch_pretraining.spectral(
        torch.from_numpy(spectrogram),
        settings,
        **{name: torch.from_numpy(np.array(draw)) for name, draw in spectral.items()},
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_optimizer_by_the_same_gradients():
    """Schedule, decay of kernels only, both moments: parameters after steps of given gradients."""
    config = pretrain.get_config("demo")
    section, rng = config.optimizer, np.random.default_rng(8)
    with config.unlocked():
        config.steps, section.warmup_steps, section.weight_decay = 9, 3, 20.0
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    ours = create_optimizer(
        name=section.name,
        schedule=warmup_cosine(
            learning_rate=section.learning_rate, warmup_steps=3, steps=config.steps
        ),
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        beta2=section.beta2,
        clip_norm=0.0,
    )
    state = ours.init(params)
    network = torch.nn.Module()
    for name, value in params.items():
        network.register_parameter(name, torch.nn.Parameter(torch.tensor(value)))
    theirs = pytorch_pretraining.optimizer(network, section)
    start = params
    for step in range(8):
        gradient = {
            name: rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()
        }
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for group in theirs.param_groups:
            group["lr"] = pytorch_pretraining.learning_rate(step, section, config.steps)
        for name, value in gradient.items():
            network.get_parameter(name).grad = torch.from_numpy(value)
        theirs.step()
        for name, value in params.items():
            np.testing.assert_allclose(
                network.get_parameter(name).detach(), value, rtol=1e-5, atol=1e-6, err_msg=name
            )
    assert all(np.abs(params[name] - start[name]).max() > 1e-3 for name in params)
