"""Learning-rate schedules against values by hand, and the parameters that decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avcl_jax.models.transformers import AudioTransformer
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine, warmup_multistep


def test_a_multistep_schedule_rises_then_falls_at_its_milestones():
    schedule = warmup_multistep(learning_rate=1.0, warmup_steps=4, milestones=(6, 8), factor=0.5)
    found = [float(schedule(step)) for step in range(10)]
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_without_warm_up_it_begins_at_the_full_rate():
    schedule = warmup_multistep(learning_rate=2.0, warmup_steps=0, milestones=(2,), factor=0.1)
    np.testing.assert_allclose([float(schedule(s)) for s in range(4)], [2, 2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_cosine_rises_then_falls_to_zero(warmup_steps):
    schedule = warmup_cosine(learning_rate=2.0, warmup_steps=warmup_steps, steps=12)
    steps = np.arange(warmup_steps, 13)
    falling = 1 + np.cos(np.pi * (steps - warmup_steps) / (12 - warmup_steps))
    found = [float(schedule(step)) for step in range(13)]
    np.testing.assert_allclose(found, [*np.arange(warmup_steps) / 2, *falling], atol=1e-6)
    with pytest.raises(ValueError, match=r"warmup_steps 12 must be .* below steps 12"):
        warmup_cosine(learning_rate=2.0, warmup_steps=12, steps=12)


@pytest.mark.parametrize("milestones", [(3, 3), (5, 4), (2,)])
def test_milestones_that_make_no_sense_are_refused(milestones):
    with pytest.raises(ValueError, match="must increase and come after the 2 steps"):
        warmup_multistep(learning_rate=1.0, warmup_steps=2, milestones=milestones, factor=0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_kernels_decay_and_biases_scales_and_positions_do_not(name):
    encoder = AudioTransformer(width=4, depth=1, heads=2, patch=(2, 2), dtype=jnp.float32)
    variables = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 4, 4)), train=False)
    )
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables["params"])
    optimizer = create_optimizer(
        name=name,
        schedule=optax.constant_schedule(0.5),
        weight_decay=0.1,
        momentum=0.0,
        beta2=0.9,
        clip_norm=0.0,
    )
    no_gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(no_gradients, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        change = -0.5 * 0.1 if path[-1].key == "kernel" else 0.0
        np.testing.assert_allclose(update, change, rtol=1e-6, err_msg=str(path))
    last = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert last == {"kernel", "bias", "scale", "positions"}
