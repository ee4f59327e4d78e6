"""Effect of the feature bank on the embeddings in training."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.contrastive import contrastive_loss
from avcl_jax.objectives.views import MODALITIES, Views
from tests.objectives.bank_model import bank_rows

VIDEOS, SOURCES, FEATURES, DIM, SIZE = 32, 600, 48, 32, 256
TERMS = (("video", "video"), ("video", "audio"), ("audio", "video"), ("audio", "audio"))
SAMPLING = BankSampling(
    space="agreement",
    ranking="content",
    playbacks=1,
    num_positives=2,
    num_negatives=32,
    positive_ranks=8,
    negative_candidates=SIZE,
    negative_offset=0.125,
    positive_sampling="gumbel",
    negative_sampling="uniform",
    temperature=0.1,
)
OPTIMIZER = optax.adam(3e-3)


def encode(params, features):
    """Unit embeddings [videos, 2, dim] of a small network."""
    hidden = jax.nn.relu(features @ params["hidden"])
    embeddings = hidden @ params["out"]
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="use")
def train_step(params, optimizer, bank, batch, key, *, use):
    present = jnp.ones((VIDEOS, 2), bool)

    def objective(params):
        views = Views(
            embeddings={name: encode(params[name], batch[name]) for name in params},
            present=dict.fromkeys(MODALITIES, present),
            playback=dict.fromkeys(MODALITIES, jnp.zeros((VIDEOS, 2), jnp.int32)),
            label=jnp.zeros((VIDEOS, 0), jnp.int32),
            source_id=batch["source_id"],
            record_index=batch["source_id"],
        )
        total = 0.0
        for anchor, target in TERMS:
            options = {"term": (anchor, target), "terms": TERMS, "sampling": SAMPLING}
            drawn = feature_bank.sample(bank, key, views, active=use, **options)
            loss, metrics = contrastive_loss(
                views.embeddings[anchor],
                views.embeddings[target],
                kind="within" if anchor == target else "cross",
                source_id=views.source_id,
                anchor_mask=present,
                target_mask=present,
                temperature=0.1,
                positive_weight=0.1,
                **bank_rows(drawn),
            )
            total += loss
            if (anchor, target) == ("video", "audio"):
                negatives = metrics["negative_similarity"]
        return total, (views, negatives)

    gradient, (views, negatives) = jax.grad(objective, has_aux=True)(params)
    updates, optimizer = OPTIMIZER.update(gradient, optimizer)
    bank = feature_bank.insert(bank, views)
    z = views.embeddings
    spread = {m: jnp.sqrt(x.reshape(-1, DIM).var(axis=0).sum()) for m, x in z.items()}
    return optax.apply_updates(params, updates), optimizer, bank, (negatives, spread)


def trained(*, bank_from, steps=200):
    """Similarity of negatives, and spreads by modality: means over the last 20 steps."""
    rng = np.random.default_rng(0)
    content = rng.normal(size=(SOURCES, 12))
    mixing = {modality: rng.normal(size=(12, FEATURES)) for modality in ("video", "audio")}

    def weights(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    params = {
        modality: {"hidden": weights(FEATURES, 64), "out": weights(64, DIM)} for modality in mixing
    }
    optimizer = OPTIMIZER.init(params)
    bank = feature_bank.create(SIZE, DIM, jnp.float32, labels=0)
    last = []
    for step in range(steps):
        chosen = rng.choice(SOURCES, VIDEOS, replace=False)
        batch = {
            modality: jnp.asarray(
                content[chosen, None] @ mix + 8 * rng.normal(size=(VIDEOS, 2, FEATURES)),
                jnp.float32,
            )
            for modality, mix in mixing.items()
        }
        batch["source_id"] = jnp.asarray(chosen, jnp.int32)
        params, optimizer, bank, found = train_step(
            params, optimizer, bank, batch, jax.random.key(step), use=step >= bank_from
        )
        last = [*last[-19:], found]
    return jax.tree.map(lambda *values: float(np.mean(values)), *last)


def test_switching_the_bank_on_does_not_drag_the_embeddings_along():
    """Without balanced gradients, negatives reach a similarity of 0.6, spreads fall to 0.6."""
    without, spread_without = trained(bank_from=200)
    negatives, spread = trained(bank_from=60)
    assert abs(without) < 0.2
    assert abs(negatives) < 0.2
    for modality in spread:
        assert spread[modality] > 0.95 * spread_without[modality]
