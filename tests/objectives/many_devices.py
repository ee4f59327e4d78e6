"""What the objectives compute on eight devices; run by `test_many_devices` in a process of its own.

Writes one .npz with, for every layout of devices, the bank after some insertions, what is sampled
from it, the loss and its gradient on a sharded batch, and the bytes that compiled programs
exchange.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import RowNumbers
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.contrastive import contrastive_loss
from tests.hlo import collective_bytes
from tests.objectives.bank_model import PLAYBACKS, bank_rows, random_batch

VIDEOS, BATCHES, SOURCES = 16, 7, 60
TERMS = (("video", "video"), ("video", "audio"), ("audio", "video"))
# (rows of the bank, size of an embedding, space): a small bank is gathered, a large one makes
# candidates cheaper. A shard that holds all rows is asked for more of them than fit into one round.
# Embeddings of an odd size do not fill whole words.
EXCHANGES = {
    "gather": (160, 7, "agreement"),
    "merge": (3200, 8, "same"),
    "crowded": (3200, 7, "same"),
}
CROWDED_SHARD, SHARDS = 3, 8
LAYOUTS = {"data": ((8,), ("data",)), "data_fsdp": ((4, 2), ("data", "fsdp"))}


def sampling_of(space):
    return BankSampling(
        space=space,
        ranking="content",
        playbacks=PLAYBACKS,
        num_positives=2,
        num_negatives=3,
        positive_ranks=8,
        negative_candidates=40,
        negative_offset=0.1,
        positive_sampling="gumbel",
        negative_sampling="uniform",
        temperature=0.2,
    )


def mesh_of(layout):
    if layout == "one":
        return None
    shape, names = LAYOUTS[layout]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def layout_of(mesh):
    """Functions that place rows, and the bank, on the layout's devices."""
    if mesh is None:
        return partial(jax.tree.map, jnp.asarray), lambda bank: bank
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return (
        lambda values: jax.device_put(values, rows),
        lambda bank: jax.device_put(bank, feature_bank.shardings(mesh)),
    )


def sample_all(bank, key, views, *, sampling, mesh):
    """The rows of all terms of a step."""
    options = {"terms": TERMS, "sampling": sampling, "active": True, "mesh": mesh}
    return [feature_bank.sample(bank, key, views, term=term, **options) for term in TERMS]


def loss_and_gradient(batch, drawn):
    """The video → audio term on sampled bank rows."""

    def loss(video, audio):
        return contrastive_loss(
            video,
            audio,
            kind="cross",
            source_id=batch.source_id,
            anchor_mask=batch.present["video"],
            target_mask=batch.present["audio"],
            temperature=0.1,
            positive_weight=0.4,
            **bank_rows(drawn),
        )[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(
        batch.embeddings["video"], batch.embeddings["audio"]
    )


def record(results, name, tree):
    """Adds the arrays of a tree, as float32 instead of bfloat16."""
    for path, values in jax.tree_util.tree_leaves_with_path(tree):
        values = values.astype(jnp.float32) if values.dtype == jnp.bfloat16 else values
        results[name + jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(values)


def run(layout, exchange, results):
    """Fills a bank, samples it, and counts bytes."""
    size, dim, space = EXCHANGES[exchange]
    mesh = mesh_of(layout)
    place_rows, place_bank = layout_of(mesh)
    rng = np.random.default_rng(0)
    bank = place_bank(feature_bank.create(size, dim, jnp.bfloat16, labels=2))
    insert = jax.jit(partial(feature_bank.insert, mesh=mesh), donate_argnums=0)
    batches = [random_batch(rng, VIDEOS, dim, SOURCES) for _ in range(BATCHES + 1)]
    *before, batch = [
        place_rows(batch._replace(record_index=batch.record_index + 100)) for batch in batches
    ]
    for other in before:
        bank = insert(bank, other)
    if exchange == "crowded":
        insertion, columns = bank.rows.numbers.insertion, bank.rows.numbers.columns
        shard = insertion % (2 * VIDEOS) // (2 * VIDEOS // SHARDS)
        kept = columns.at[:, 0].set(jnp.where(shard == CROWDED_SHARD, insertion, -1))
        bank = bank.replace(rows=bank.rows.replace(numbers=RowNumbers(kept)))
    key = jax.random.key(5)
    sample = jax.jit(partial(sample_all, sampling=sampling_of(space), mesh=mesh))
    compiled = sample.lower(bank, key, batch).compile()
    drawn = compiled(bank, key, batch)
    loss, gradient = jax.jit(loss_and_gradient)(batch, drawn[1])

    name = f"{layout}/{exchange}"
    unranked = dataclasses.replace(sampling_of(space), num_positives=0, positive_ranks=0)
    shapes = jax.eval_shape(partial(sample_all, sampling=unranked, mesh=mesh), bank, key, batch)
    for field, kind in shapes[0]._asdict().items():
        results[f"{name}/unranked/{field}"] = np.array(kind.embeddings.shape)
    record(results, f"{name}/bank/", bank)
    record(results, f"{name}/drawn/", drawn)
    results[f"{name}/loss"] = np.asarray(loss)
    results[f"{name}/gradient"] = np.stack(gradient)
    if mesh is not None:
        count = collective_bytes(compiled.as_text())
        results[f"{name}/sample_bytes"] = np.array(count.total())
        results[f"{name}/all_to_all_bytes"] = np.array(count["all-to-all"])
        text = insert.lower(bank, batch).compile().as_text()
        results[f"{name}/insert_bytes"] = np.array(collective_bytes(text).total())
    if layout == "one":
        moved = jax.jit(
            partial(feature_bank.redistribute, global_batch_size=VIDEOS, shards=SHARDS),
            out_shardings=feature_bank.shardings(mesh_of("data")),
        )(bank)
        record(results, f"moved/{exchange}/bank/", moved)


def large_batch(results):
    """Compiles, without running, the loss of 1,024 videos: what one device keeps and receives."""
    mesh = mesh_of("data")
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def loss(video, audio, source_id, has_video, has_audio):
        options = {"kind": "cross", "temperature": 0.1, "positive_weight": 0.0}
        masks = {"anchor_mask": has_video, "target_mask": has_audio}
        return contrastive_loss(video, audio, source_id=source_id, **masks, **options)[0]

    arguments = [
        jax.ShapeDtypeStruct((1024, *shape), dtype, sharding=rows)
        for shape, dtype in (*[((2, 128), jnp.float32)] * 2, ((), jnp.int32), *[((), bool)] * 2)
    ]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, rows))
    compiled = gradient.lower(*arguments).compile()
    results["large/temporary_bytes"] = np.array(compiled.memory_analysis().temp_size_in_bytes)
    results["large/collective_bytes"] = np.array(collective_bytes(compiled.as_text()).total())


def main(path):
    """Runs every layout on every exchange and writes the results."""
    assert jax.device_count() == SHARDS
    results = {}
    for exchange in EXCHANGES:
        for layout in ("one", *LAYOUTS):
            run(layout, exchange, results)
    large_batch(results)
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
