"""Training steps of this project that benchmarks time, each in its own process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.measure import seconds_in_turns, seconds_of_each

ENCODER, CLIP = "r2plus1d_18", (16, 112, 112, 3)
# Steps of the demo that are not timed: the first compiles, and the next map memory.
WARM_UP_STEPS = 5


def video_encoder(*, small: bool = False, **settings: Any) -> Any:
    """R(2+1)D-18, or a small network of its kind, with some settings of `VideoResNet`."""
    from avcl_jax.models.encoders import create_encoder

    settings["subtract_time_mean"] = False
    if not small:
        return create_encoder("video", ENCODER, settings)
    form = {"stem": "r2plus1d", "factorisation": "r2plus1d"}
    return create_encoder(
        "video", "resnet", {"widths": (8, 16), "depths": (1, 1)} | form | settings
    )


def encoder_gradient(encoder: Any, variables: Any, clips: Any) -> Any:
    """Loss, updated statistics and gradient of an encoder's training step."""
    import jax
    import jax.numpy as jnp

    def loss(params: Any) -> tuple[Any, Any]:
        outputs, updated = encoder.apply(
            variables | {"params": params}, clips, train=True, mutable=["batch_stats"]
        )
        return jnp.square(outputs["features"]).mean(), updated["batch_stats"]

    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, statistics, gradient


def seconds_of_encoder_steps(
    *,
    batch: int,
    steps: int,
    dtype: str = "float32",
    lowering: str = "auto",
    small: bool = False,
) -> list[float]:
    """Seconds of each step of R(2+1)D-18: forward, backward and AdamW.

    Args:
        batch: clips per step.
        steps: number of timed steps, after one that compiles.
        dtype: dtype of the computation; parameters, statistics and loss are float32.
        lowering: form of the convolutions.
        small: a small network instead.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    encoder = video_encoder(small=small, dtype=jnp.dtype(dtype), lowering=lowering)
    clips = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *CLIP)), jnp.float32)
    variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), clips)
    optimizer = optax.adamw(1e-4)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, clips: Any) -> tuple[Any, Any]:
        params, statistics, moments = state
        variables = {"params": params, "batch_stats": statistics}
        value, statistics, gradient = encoder_gradient(encoder, variables, clips)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), value

    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    def next_step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, clips))

    return seconds_of_each(next_step, steps)


def encoder_flops(*, small: bool = False) -> int:
    """Operations of the convolutions of `video_encoder` for one clip, forward and backward."""
    import jax
    import jax.numpy as jnp

    from benchmarks.model_flops import matrix_flops

    encoder = video_encoder(small=small, lowering="direct")
    clips = jax.ShapeDtypeStruct((1, *CLIP), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(functools.partial(encoder.init, train=False), key, clips)
    return matrix_flops(functools.partial(encoder_gradient, encoder), variables, clips)


def demo_training(config: Any, device: Any = None) -> tuple[Any, Any, Any, Any]:
    """The demo's training with its bank full and in use, on one device.

    Args:
        config: `configs/pretrain.py`, possibly with other numbers.
        device: the default one of JAX if None.

    Returns:
        The jitted step and its arguments: state, a batch of noise, key.
    """
    import dataclasses

    import jax
    import numpy as np

    from avcl_jax import experiment
    from avcl_jax.objectives import feature_bank
    from avcl_jax.training import program, sharding
    from avcl_jax.training.step import jit_train_step
    from benchmarks.batches import complete_views, random_batch

    mesh, init, step_function = program.build(config, [device or jax.devices()[0]])
    key = jax.random.key(0)
    state, shardings = init(key)
    # Filled with other videos and past its warm-up, so that rows are drawn from the first step on.
    size, rng = config.bank.size, np.random.default_rng(1)
    rows = rng.normal(size=(2, size // 2, 2, config.model.embedding_dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    videos = complete_views(
        {"video": rows[0], "audio": rows[1]},
        config.global_batch_size + np.arange(size // 2),
        playbacks=2 * len(config.views.speeds),
        labels=experiment.bank_labels(config),
    )
    assert state.bank is not None
    bank = feature_bank.insert(state.bank, videos)
    step_number = np.int32(config.bank.warmup_steps)
    state = jax.device_put(dataclasses.replace(state, bank=bank, step=step_number), shardings)
    step = jit_train_step(step_function, mesh, shardings)
    batch = jax.device_put(random_batch(config), sharding.rows_sharding(mesh))
    return step, state, batch, key


def check_bank_in_use(config: Any, metrics: Any) -> None:
    """Raises RuntimeError if anchors of a step got fewer positives of the bank than set."""
    positives = float(metrics["vv/bank_positives"].compute())
    if positives != config.bank.num_positives:
        raise RuntimeError(f"anchors got {positives} bank positives: the bank was not in use")


def seconds_of_demo_steps(*, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps of the demo with its bank in use."""
    import jax

    from avcl_jax.configs import pretrain

    config = pretrain.get_config("demo")
    step, state, batch, key = demo_training(config)
    metrics: Any = {}

    def next_step() -> None:
        nonlocal state, metrics
        state, metrics = jax.block_until_ready(step(state, batch, key))

    seconds = seconds_of_each(next_step, steps, warmup=WARM_UP_STEPS)
    check_bank_in_use(config, metrics)
    return seconds


def seconds_of_demo_parts(*, repeats: int) -> dict[str, list[float]]:
    """Seconds of the demo's step and of parts of it, each compiled by itself, in turns.

    Returns:
        `step`, the whole step; `encoders`, forward and backward of both; `inputs`, augmentation
        and the other operations that turn a batch into inputs.
    """
    import jax
    import jax.numpy as jnp

    from avcl_jax import experiment
    from avcl_jax.configs import pretrain
    from avcl_jax.training import program, sharding
    from avcl_jax.training.inputs import prepare_inputs
    from benchmarks.batches import random_batch

    config = pretrain.get_config("demo")
    mesh, init, step_function = program.build(config)
    key = jax.random.key(0)
    state, shardings = init(key)
    spec = experiment.render_spec(config)
    mel = spec.log_mel
    by_rows, whole = sharding.rows_sharding(mesh), sharding.replicated(mesh)
    step = jax.jit(step_function, in_shardings=(shardings, by_rows, whole))
    prepare = jax.jit(
        functools.partial(
            prepare_inputs,
            spec=spec,
            pixel_mean=config.pixels.mean,
            pixel_std=config.pixels.std,
            augmentation=experiment.augmentation(config),
            key=key,
        )
    )
    inputs = jax.block_until_ready(prepare(random_batch(config)))
    networks = {
        "video": experiment.encoder(config, "video"),
        "audio": experiment.encoder(config, "audio"),
    }
    arrays = {
        "video": inputs["video"].reshape(-1, *spec.video_shape),
        "audio": inputs["spectrogram"].reshape(-1, mel.frames, mel.mels),
    }
    variables = {
        name: {
            "params": state.params[f"{name}_encoder"],
            "batch_stats": state.batch_stats[f"{name}_encoder"],
        }
        for name in networks
    }

    @jax.jit
    def encode(variables: Any, arrays: Any) -> Any:
        def loss(params: Any) -> Any:
            total = jnp.zeros(())
            for name, network in networks.items():
                outputs, _ = network.apply(
                    variables[name] | {"params": params[name]},
                    arrays[name],
                    train=True,
                    mutable=["batch_stats"],
                )
                total += jnp.square(outputs["features"]).mean()
            return total

        return jax.grad(loss)({name: variables[name]["params"] for name in networks})

    batch = jax.device_put(random_batch(config), by_rows)
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: jax.block_until_ready(step(state, batch, key)),
        "encoders": lambda: jax.block_until_ready(encode(variables, arrays)),
        "inputs": lambda: jax.block_until_ready(prepare(batch)),
    }
    seconds_in_turns(calls, repeats=2)  # compiles, and maps memory
    return seconds_in_turns(calls, repeats=repeats)
