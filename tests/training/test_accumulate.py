"""Micro-batches: the same step as of the whole batch, but for normalisation by the batch."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.models.audio_visual import module_rows
from avcl_jax.models.layers import BatchNorm
from avcl_jax.objectives.contrastive import contrastive_loss
from avcl_jax.training import accumulate, program, sharding
from tests.training import accumulated
from tests.training.small import small_config

MESH = sharding.create_mesh(1)
VIDEOS = 12


class Model(nn.Module):
    """Embeddings of two views, with or without normalisation by the batch."""

    norm: bool

    @nn.compact
    def __call__(self, views, mask):
        x = nn.Dense(6, name="hidden")(views.reshape(-1, views.shape[-1]))
        if self.norm:
            x = BatchNorm(name="norm")(x, train=True, mask=jnp.repeat(mask, 2))
        x = nn.Dense(4, name="output")(jnp.tanh(x))
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).reshape(*views.shape[:2], -1)


def gradient(parts, *, norm=False, has_video=None):
    """Gradient of a contrastive loss, the outputs that it saw, and merged statistics."""
    rng = np.random.default_rng(0)
    views = jnp.asarray(rng.normal(2.0, 1.0, (VIDEOS, 2, 5)), jnp.float32)
    present = jnp.ones(VIDEOS, bool) if has_video is None else jnp.asarray(has_video)
    model = Model(norm)
    variables = model.init(jax.random.key(0), views, present)
    old = {"video_encoder": variables.get("batch_stats", {})}

    def forward(params, inputs):
        everything = {"params": params, "batch_stats": old["video_encoder"]}
        return model.apply(everything, *inputs, mutable=["batch_stats"])

    def objective(outputs):
        loss, _ = contrastive_loss(
            outputs,
            outputs,
            kind="within",
            source_id=jnp.arange(VIDEOS) // 2,
            anchor_mask=present,
            target_mask=present,
            temperature=0.2,
            positive_weight=0.0,
        )
        return loss, outputs

    @jax.jit
    def run(params):
        found, outputs, statistics = accumulate.gradients(
            forward, objective, params, (views, present), parts=parts, mesh=MESH
        )
        split = {"video_encoder": accumulate.split_rows(present, parts, MESH)}
        new = {"video_encoder": statistics.get("batch_stats", {})}
        return found, outputs, accumulate.merge_statistics(old, new, split)["video_encoder"]

    return *run(variables["params"]), old["video_encoder"]


@pytest.mark.parametrize("parts", [2, 12])
def test_gradients_and_outputs_are_those_of_the_whole_batch(parts):
    has_video = np.arange(VIDEOS) % 5 != 0
    expected, outputs, *_ = gradient(1, has_video=has_video)
    found, joined, *_ = gradient(parts, has_video=has_video)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.1
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected
    )
    np.testing.assert_allclose(joined, outputs, atol=1e-6)  # in the order of the batch


def test_statistics_are_updated_once_by_all_present_rows():
    """The running mean is the whole batch's, after one update; the variance is within parts."""
    has_video = np.arange(VIDEOS) % 4 != 0  # all missing rows are in the first of two parts
    by_whole, _, whole, _ = gradient(1, norm=True, has_video=has_video)
    by_parts, _, parts, old = gradient(2, norm=True, has_video=has_video)
    for name, before in (("mean", 0.0), ("var", 1.0)):
        np.testing.assert_array_equal(old["norm"]["norm"][name], before)
    mean = whole["norm"]["norm"]["mean"]
    assert np.abs(mean).min() > 1e-3
    np.testing.assert_allclose(parts["norm"]["norm"]["mean"], mean, rtol=1e-5)
    # 0.9 of the old one and 0.1 of the batch's: with two updates the old one would weigh 0.81.
    within = (parts["norm"]["norm"]["var"] - 0.9) / 0.1
    full = (whole["norm"]["norm"]["var"] - 0.9) / 0.1
    assert (within < full + 1e-6).all()
    assert (within > 0.5 * full).all()
    # What normalisation by the batch makes of it is not the whole batch's gradient.
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), by_whole, by_parts)
    assert max(jax.tree.leaves(differences)) > 1e-3


def test_statistics_stay_where_no_row_is_present():
    """Also in the heads of pairs, when no pair has both."""
    names = ("video_encoder", "audio_encoder", "order_vv_head", "order_aa_head", "order_va_head")
    old = {name: {"mean": jnp.zeros(3)} for name in names}
    new = {name: {"mean": jnp.array([[1.0] * 3, [jnp.nan] * 3])} for name in names}
    present = {
        # The second view of the first video has sound, but not its first picture.
        "video": jnp.array([[[False, True], [True, True]], [[False, False], [False, False]]]),
        "audio": jnp.array([[[False, True], [False, False]], [[False, False], [False, False]]]),
    }
    merged = accumulate.merge_statistics(old, new, jax.vmap(module_rows)(present))
    changed = {name: float(values["mean"][0]) for name, values in merged.items()}
    assert changed == dict(zip(names, (1.0, 1.0, 1.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"micro_batches": 3},
            "global_batch_size 8 is not divisible by the 1 devices times 3 micro_batches: use a "
            "multiple of 3, such as 6",
        ),
        ({"micro_batches": 0}, "micro_batches 0 must be at least 1"),
    ],
)
def test_a_batch_that_does_not_divide_is_one_clear_error(overrides, message):
    with pytest.raises(ValueError, match=message):
        program.build(small_config("unused", **overrides))


steps = functools.cache(accumulated.steps)


def assert_same_steps(found, expected):
    """Metrics, updates, statistics and bank agree, and there is something to agree on."""
    assert found.keys() == expected.keys()
    for name in expected:
        if name != "collectives" and ".params" not in name:
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
            )
    assert expected["0/metric/loss"] > 1
    assert expected["2/metric/va/bank_positives"] > 0.5
    for number in range(accumulated.STEPS):
        changes = {n: v for n, v in expected.items() if n.startswith(f"{number}.params")}
        largest = max(np.abs(change).max() for change in changes.values())
        assert largest > 1e-2
        for name, change in changes.items():
            np.testing.assert_allclose(
                found[name], change, rtol=1e-5, atol=1e-5 * largest, err_msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_steps_in_parts_are_those_of_the_whole_batch(parts):
    """The whole training step, all terms, bank and augmentation, without normalisation by batch."""
    assert_same_steps(steps(parts, frozen=True), steps(1, frozen=True))


@pytest.fixture(scope="module")
def on_eight_devices(run_with_cpu_devices, tmp_path_factory):
    path = tmp_path_factory.mktemp("accumulate") / "results.npz"
    run_with_cpu_devices(8, accumulated.__name__, str(path))
    found = dict(np.load(path))
    return {
        parts: {n.partition("|")[2]: v for n, v in found.items() if n.startswith(f"{parts}|")}
        for parts in ("1", "2", "inputs")
    }


@pytest.mark.slow
def test_devices_compute_the_spectrograms_of_their_own_rows(on_eight_devices):
    found = on_eight_devices["inputs"]
    np.testing.assert_allclose(found["spectrogram"], found["expected"], atol=1e-4)
    assert found["collectives"] == 0


@pytest.mark.slow
def test_eight_devices_in_parts_agree_and_keep_their_rows(on_eight_devices):
    whole, parts = on_eight_devices["1"], on_eight_devices["2"]
    assert_same_steps(parts, whole)
    one = steps(1, frozen=True)
    for name in one:
        if "/metric/" in name or ".params" in name:
            np.testing.assert_allclose(parts[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    # Rows of the batch stay on their devices: nothing is exchanged that was not before.
    np.testing.assert_array_equal(parts["collectives"], whole["collectives"])
