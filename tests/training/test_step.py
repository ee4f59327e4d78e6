"""One step: every term enters the loss with its weight, every part learns, absence is harmless."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data.pipeline import to_device_batch, train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.objectives import feature_bank, temporal
from avcl_jax.objectives.bank_rows import has_all
from avcl_jax.training import objective, program, sharding
from avcl_jax.training.checkpoint import Checkpoints, Progress, load_variables
from avcl_jax.training.inputs import prepare_inputs
from avcl_jax.training.objective import CONTRASTIVE_TERMS, LossSpec, total_loss
from avcl_jax.training.state import TrainState
from benchmarks import aot
from benchmarks.batches import random_batch
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import small_config

# Distinct and none a sum of others, so that no mix-up of terms gives the same total.
WEIGHTS = {term: 2.0**n / 16 for n, term in enumerate((*CONTRASTIVE_TERMS, *temporal.TASKS))}
EMA_DECAY = 0.6


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """States before and after each of three steps, with their metrics."""
    records = [make_record(n, seconds=5.0, side=24) for n in range(10)]
    # From the third batch on no file has video.
    records += [make_record(n, seconds=5.0, side=24, has_video=False) for n in range(10, 18)]
    directory = write_records(tmp_path_factory.mktemp("step") / "records", records, shards=1)
    overrides = {f"loss.weights.{term}": weight for term, weight in WEIGHTS.items()}
    overrides |= {"bank.size": 16, "optimizer.name": "sgd", "optimizer.ema_decay": EMA_DECAY}
    config = small_config(directory, **overrides)
    mesh, init, step = program.build(config)
    state, _ = init(jax.random.key(0))
    source = UsableRecords(RecordDataset(directory, "train"), experiment.render_spec(config))
    rows = sharding.rows_sharding(mesh)
    batches = train_batches(
        source, experiment.render_spec(config), seed=0, global_batch_size=8, threads=1
    )
    jitted = jax.jit(step)
    states, metrics = [jax.device_get(state)], []
    found = list(itertools.islice(iter(batches), 3))
    blind = {**found[2], "has_video": np.zeros(8, bool)}
    for batch in [*found[:2], blind]:
        state, values = jitted(state, to_device_batch(batch, rows), jax.random.key(1))
        states.append(jax.device_get(state))
        metrics.append({name: v for name, v in jax.device_get(values).items()})
    return states, metrics


def test_the_loss_is_the_weighted_sum_of_all_terms(ran):
    _, metrics = ran
    for values in metrics[:2]:
        terms = {term: float(values[f"{term}/loss"].compute()) for term in WEIGHTS}
        assert all(value > 0 for value in terms.values()), terms
        total = 0.0
        for term, value in terms.items():
            possible = 8 * PER_VIDEO[term] * len(CONTRASTIVE_TERMS.get(term, [()]))
            fraction = float(values[f"{term}/loss"].count) / possible
            assert 0 < fraction <= 1
            total += WEIGHTS[term] * fraction * value
        assert float(values["loss"].compute()) == pytest.approx(total, rel=1e-5)


def test_every_parameter_learns(ran):
    states, _ = ran
    before = jax.tree_util.tree_flatten_with_path(states[1].params)[0]
    after = jax.tree.leaves(states[2].params)
    still = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(before, after, strict=True)
        if np.array_equal(old, new)
    ]
    # The last scale of a residual branch starts at 0 and so keeps its branch from learning in the
    # first step that has a learning rate.
    assert all("block1" in name for name in still), still
    assert not any("head" in name or "projection" in name for name in still), still


def test_a_batch_without_video_leaves_the_video_side_alone(ran):
    states, metrics = ran
    for name in ("vv", "va", "speed_video", "direction_video", "order_vv", "order_va"):
        loss = metrics[2][f"{name}/loss"]
        assert float(loss.total) == float(loss.count) == 0.0  # does not count in a period's mean
    for state in states:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    for name in ("video_encoder", "video_projection", "order_vv_head", "order_va_head"):
        before, after = states[2].batch_stats[name], states[3].batch_stats[name]
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(new, old, err_msg=name)
    changed = zip(
        jax.tree.leaves(states[2].batch_stats["audio_encoder"]),
        jax.tree.leaves(states[3].batch_stats["audio_encoder"]),
        strict=True,
    )
    assert any(not np.array_equal(old, new) for old, new in changed)


def test_gradient_norms_are_of_the_whole_and_of_each_encoder(ran):
    _, metrics = ran
    for number, values in enumerate(metrics):
        norms = {
            name: float(values[f"health/{name}gradient_norm"].compute())
            for name in ("", "video_encoder_", "audio_encoder_")
        }
        assert norms[""] > np.hypot(norms["video_encoder_"], norms["audio_encoder_"])
        assert norms["audio_encoder_"] > 0
        assert (norms["video_encoder_"] > 0) == (number < 2)  # the third batch has no video


def test_health_is_that_of_the_embeddings_and_parameters_of_the_step(ran):
    """The bank has as many rows as a step inserts, so after a step it contains its embeddings."""
    states, metrics = ran
    for values, state in zip(metrics, states[1:], strict=True):
        rows = state.bank.rows
        for modality in ("video", "audio"):
            present = np.asarray(has_all(rows.presence, (modality,)))
            if present.any():
                spread = np.sqrt(rows.embeddings[modality][present].var(axis=0).sum())
                found = values[f"health/{modality}_embedding_std"].compute()
                np.testing.assert_allclose(found, spread, rtol=1e-4)
            lacking = values[f"data/without_{modality}"].compute()
            np.testing.assert_allclose(lacking, 1 - present.mean(), atol=1e-6)
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(state.params)))
        np.testing.assert_allclose(values["health/parameter_norm"].compute(), norm, rtol=1e-5)
    assert float(metrics[0]["learning_rate"].compute()) == 0  # warm-up
    assert float(metrics[1]["learning_rate"].compute()) > 0


def test_the_moving_average_excludes_the_initialisation(ran):
    """The weight of a step is `ema_decay` to the power of its age, for statistics too."""
    states, _ = ran
    for taken in (1, 2, 3):
        weights = EMA_DECAY ** np.arange(taken)[::-1]
        weights /= weights.sum()
        for name in ("params", "batch_stats"):
            expected = jax.tree.map(
                lambda *leaves, weights=weights: np.tensordot(weights, np.stack(leaves), 1),
                *(getattr(state, name) for state in states[1 : taken + 1]),
            )
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                getattr(states[taken], f"ema_{name}"),
                expected,
            )
    averages, last = (jax.tree.leaves(getattr(states[3], f"{n}batch_stats")) for n in ("ema_", ""))
    assert max(np.abs(a - b).max() for a, b in zip(averages, last, strict=True)) > 1e-3


def test_averaged_parameters_are_loaded_with_averaged_statistics(ran, tmp_path):
    states, _ = ran
    with Checkpoints(tmp_path, keep=1) as manager:
        manager.save(states[3], Progress(3, 0.0, "", 1))
    variables, step = load_variables(tmp_path)
    assert step == 3
    expected = {"params": states[3].ema_params, "batch_stats": states[3].ema_batch_stats}
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


VIDEOS, DIM = 8, 6
# Anchors of a direction, or classifications, of one video.
PER_VIDEO = {term: 1 if term in ("order_vv", "order_aa") else 2 for term in WEIGHTS}
NO_STATE = TrainState(np.int32(0), *[None] * 6)


def outputs_and_batch():
    """Random outputs of a model, and a batch of which the last two rows could not be read."""
    rng = np.random.default_rng(0)
    outputs = {f"{m}_embeddings": rng.normal(size=(VIDEOS, 2, DIM)) for m in ("video", "audio")}
    outputs = {n: v / np.linalg.norm(v, axis=-1, keepdims=True) for n, v in outputs.items()}
    for name, task in temporal.TASKS.items():
        shape = (VIDEOS,) if task.within else (VIDEOS, 2)
        outputs[name] = rng.normal(size=(*shape, len(task.classes((1, 2, 4, 8)))))
    batch = random_batch(small_config(Path("unused"), global_batch_size=VIDEOS))
    batch["unreadable"] = np.arange(VIDEOS) >= VIDEOS - 2
    for name in ("has_video", "has_audio", "speed_mask", "direction_mask", "order_mask"):
        batch[name] = (batch[name].T & ~batch["unreadable"]).T
    return {name: v.astype(np.float32) for name, v in outputs.items()}, batch


def loss_of(outputs, batch, state, **overrides):
    """Total loss and its metrics, by the weights above."""
    weights = {f"loss.weights.{term}": weight for term, weight in WEIGHTS.items()}
    spec = program.loss_spec(small_config(Path("unused"), **weights | overrides))
    options = {"loss_spec": spec, "key": jax.random.key(0), "mesh": sharding.create_mesh(1)}
    loss, (metrics, _) = total_loss(outputs, batch, state=state, **options)
    return loss, metrics


@pytest.mark.parametrize("counted", [2, 5])
@pytest.mark.parametrize("lacking", ["video", "audio"])
def test_an_example_weighs_the_same_however_many_others_lack_a_modality(lacking, counted):
    """The loss is the sum of the means over counted examples, times their fraction."""
    outputs, batch = outputs_and_batch()
    batch[f"has_{lacking}"][counted:] = False
    # Terms of the modality that all readable videos have do not change.
    whole = "v" if lacking == "audio" else "a"
    unaffected = {2 * whole, f"order_{2 * whole}"} | {
        f"{task}_{'video' if whole == 'v' else 'audio'}" for task in ("speed", "direction")
    }
    loss, metrics = jax.jit(partial(loss_of, **{"bank.size": 0}))(outputs, batch, NO_STATE)
    expected = 0.0
    for term, weight in WEIGHTS.items():
        mean, counts = metrics[f"{term}/loss"].compute(), metrics[f"{term}/loss"].count
        videos = 6 if term in unaffected else counted
        assert counts == videos * PER_VIDEO[term] * len(CONTRASTIVE_TERMS.get(term, [()]))
        assert mean > 0
        expected += weight * videos / 6 * mean
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_terms_of_a_modality_that_is_not_trained_are_left_out(modality):
    config = small_config(Path("unused"), modalities=modality)
    _, init, step = program.build(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init(key)[0], key)
    shapes = experiment.render_spec(config).batch_shapes(config.global_batch_size)
    batch = {name: jax.ShapeDtypeStruct(*value) for name, value in shapes.items()}
    _, metrics = jax.eval_shape(step, state, batch, key)
    letter = modality[0]
    terms = {2 * letter, f"speed_{modality}", f"direction_{modality}", f"order_{2 * letter}"}
    groups = {name.partition("/")[0] for name in metrics if "/" in name}
    assert groups == terms | {"bank", "data", "health"}
    # The agreement of both modalities would leave every anchor without rows.
    spec = program.loss_spec(config).bank
    assert (config.bank.space, spec.space) == ("agreement", "same")
    config.bank.space = "cross"
    with pytest.raises(ValueError, match=f"compares video with audio, and modalities={modality}"):
        program.loss_spec(config)
    config.bank.space = "same"
    config.loss.weights.update(dict.fromkeys(terms, 0.0))
    with pytest.raises(ValueError, match="all loss weights are 0"):
        program.loss_spec(config)


def test_the_bank_is_used_once_it_is_full_and_the_warm_up_is_over(ran):
    states, metrics = ran
    assert int(states[1].bank.inserted) == 16
    assert float(metrics[1]["va/bank_age_rows"].compute()) > 0
    outputs, batch = jax.tree.map(jnp.asarray, outputs_and_batch())
    rows = objective._views(outputs, batch | {"source_id": batch["source_id"] + VIDEOS}, ())
    bank = feature_bank.insert(feature_bank.create(16, DIM, jnp.float32, labels=1), rows)

    @jax.jit
    def positives(step, inserted):
        state = NO_STATE.replace(step=step, bank=bank.replace(inserted=inserted))
        settings = {"bank.size": 16, "bank.warmup_steps": 5}
        return loss_of(outputs, batch, state, **settings)[1]["va/bank_positives"].compute()

    found = {(step, rows): positives(step, rows) > 0.5 for step in (4, 5) for rows in (15, 16)}
    assert [key for key, used in found.items() if used] == [(5, 16)]


def test_frames_are_augmented_once_however_many_operations_read_them():
    config = pretrain.get_config("demo")
    spec = experiment.render_spec(config)

    def read_twice(batch):
        video = prepare_inputs(
            batch,
            spec,
            pixel_mean=config.pixels.mean,
            pixel_std=config.pixels.std,
            augmentation=experiment.augmentation(config),
            key=jax.random.key(0),
        )["video"]
        return video - video.mean(axis=2, keepdims=True)

    text = jax.jit(read_twice).lower(random_batch(config)).compile().as_text()
    heads = re.findall(r"^%fused\S* \(.*", text, re.MULTILINE)
    assert len([head for head in heads if "u8[" in head]) == 1


def test_on_accelerators_networks_multiply_bfloat16_and_all_else_at_full_precision():
    """Lowered for them, not run: results that are promised must not depend on the platform."""
    settings = {"model.dtype": "bfloat16", "spectrogram.where": "device"}
    config = small_config(Path("unread"), **settings)
    step, arguments = aot.program(config, jax.devices())
    text = step.trace(*arguments).lower(lowering_platforms=("tpu", "cuda")).as_text()
    operations = re.findall(r"stablehlo\.(convolution|dot_general)\b(.*) : \((.*)\) ->", text)
    number = Counter(name for name, *_ in operations)
    assert min(number["convolution"], number["dot_general"]) > 10
    for name, attributes, types in operations:
        if "xf32>" in types:
            assert name == "dot_general", types
            assert "precision = [HIGHEST, HIGHEST]" in attributes, types
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(arguments[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"vv": 0.0}}, "nothing would be learned"),
        ({"weights": {"speed": 1.0}}, "unknown loss terms speed:"),
        ({"temperature": 0.0}, r"loss\.temperature 0\.0 must be positive"),
        ({"positive_weight": 1.5}, r"loss\.positive_weight 1\.5 must be from 0 to 1"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(settings, message):
    known = {"weights": {"vv": 1.0}, "temperature": 0.1, "positive_weight": 0.2}
    with pytest.raises(ValueError, match=message):
        LossSpec(**known | settings, bank=None, bank_warmup_steps=0, bank_labels=())
