"""The feature bank on one device: against a reference in numpy, and distributions of its draws."""

from __future__ import annotations

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.errors import UserError
from avcl_jax.objectives import bank_health, bank_ranking, feature_bank
from avcl_jax.objectives.bank_exchange import exchange_bytes
from avcl_jax.objectives.bank_rows import BankRows, RowNumbers
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.views import MODALITIES, Views
from tests.objectives.bank_model import PLAYBACKS, BankModel, as_set, random_batch

VIDEOS, DIM, SIZE, SOURCES = 4, 6, 40, 12
TERMS = [("video", "video"), ("video", "audio"), ("audio", "video"), ("audio", "audio")]

insert = jax.jit(feature_bank.insert)
LABELS = ("motion", "material")


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


@cache
def sampler(term, sampling):
    options = {"term": term, "terms": TERMS, "sampling": sampling, "active": True}
    return jax.jit(partial(feature_bank.sample, **options))


def filled(seed, batches, *, missing=0.2, sources=SOURCES, dtype=jnp.float32, size=SIZE):
    rng = np.random.default_rng(seed)
    bank = feature_bank.create(size, DIM, dtype, labels=2)
    for _ in range(batches):
        bank = insert(bank, random_batch(rng, VIDEOS, DIM, sources, missing))
    return bank, random_batch(rng, VIDEOS, DIM, sources, missing)


def sampling_of(space="same", sampling="gumbel", **changes):
    arguments = {
        "space": space,
        "ranking": "content",
        "playbacks": PLAYBACKS,
        "num_positives": 3,
        "num_negatives": 4,
        "positive_ranks": 5,
        "negative_candidates": 30,
        "negative_offset": 0.2,
        "positive_sampling": sampling,
        "negative_sampling": sampling,
        "temperature": 0.3,
    }
    return BankSampling(**(arguments | changes))


def test_a_thousand_random_operations():
    """Contents after insertions and all sampled rows agree with the reference in numpy.

    Asserted separately: rows of the same source, empty rows and rows that lack a modality are never
    returned; sources of positives differ, and are not among the negatives.
    """
    rng = np.random.default_rng(0)
    configurations = [
        (TERMS[0], sampling_of("same")),
        (TERMS[1], sampling_of("same", "uniform", negative_sampling="gumbel")),
        (TERMS[2], sampling_of("cross")),
        (TERMS[0], sampling_of("cross", ranking="raw", negative_offset=0.0)),
        (TERMS[1], sampling_of("agreement")),
        (TERMS[3], sampling_of("agreement", "uniform", num_negatives=0, ranking="raw")),
        (TERMS[0], sampling_of("same", num_positives=0, positive_ranks=0)),
    ]
    samplers = [sampler(*configuration) for configuration in configurations]
    bank, model = feature_bank.create(SIZE, DIM, jnp.float32, labels=2), BankModel(SIZE)
    returned = 0
    for operation in range(1000):
        batch = random_batch(rng, VIDEOS, DIM, SOURCES)
        for modality in MODALITIES:  # whatever an encoder returns for a missing one
            batch.embeddings[modality][~batch.present[modality]] = np.nan
        if rng.random() < 0.5:
            bank = insert(bank, batch)
            model.insert(batch)
            assert bank.inserted == model.inserted
            if operation % 10 == 0:
                held, expected = as_set(bank), model.as_set()
                for name in expected:
                    np.testing.assert_array_equal(held[name], expected[name], err_msg=name)
            continue
        choice = rng.integers(len(samplers))
        term, sampling = configurations[choice]
        batch = batch._replace(record_index=rng.integers(0, 2**20, VIDEOS).astype(np.int32))
        key = jax.random.key(operation)
        drawn = samplers[choice](bank, key, batch)
        drawn = jax.tree.map(np.asarray, drawn)
        rows = {row["insertion"]: row for row in model.rows}
        for i in range(VIDEOS):
            for view in range(2):
                number = TERMS.index(term)
                expected = model.sample(key, number, batch, i, view, term, sampling)
                near = {rows[number]["source_id"] for number in expected[0]}
                assert not near & {rows[number]["source_id"] for number in expected[1]}
                for kind, numbers in zip(("positives", "negatives"), expected, strict=True):
                    values, mask, held = jax.tree.map(
                        lambda values, i=i, view=view: values[i, view], getattr(drawn, kind)
                    )
                    insertion, held = held.insertion, held.columns
                    assert insertion[mask].tolist() == numbers
                    assert (held[~mask] == -1).all()
                    assert not values[~mask].any()
                    picked = [rows[number] for number in insertion[mask]]
                    assert len(set(numbers)) == len(numbers)
                    for row, value in zip(picked, values[mask], strict=True):
                        assert row["source_id"] != batch.source_id[i]
                        assert row[f"has_{term[1]}"]
                        np.testing.assert_array_equal(value, row[term[1]])
                    for row, own in zip(picked, held[mask], strict=True):
                        playback = [row["video_playback"], row["audio_playback"]]
                        assert own[1:].tolist() == [row["source_id"], *playback, *row["label"]]
                    if kind == "positives":
                        sources = [row["source_id"] for row in picked]
                        assert len(set(sources)) == len(sources)
                    returned += len(numbers)
    assert model.inserted > 10 * SIZE
    assert returned > 5000


@pytest.mark.parametrize("space", ["same", "cross", "agreement"])
def test_empty_bank_and_inactive_bank_return_nothing(space):
    bank, batch = filled(0, batches=SIZE // (2 * VIDEOS))
    sample = sampler(("video", "audio"), sampling_of(space))
    assert feature_bank.is_full(bank)
    empty = feature_bank.create(SIZE, DIM, jnp.float32, labels=2)
    assert not feature_bank.is_full(empty)
    assert (empty.rows.numbers.columns == -1).all()
    rows = empty.rows.replace(presence=jnp.full(SIZE, 3, jnp.uint8))
    unwritten = empty.replace(rows=rows)
    for some, active in ((empty, True), (unwritten, True), (bank, False)):
        drawn = sample(some, jax.random.key(0), batch, active=active)
        assert not drawn.positives.mask.any()
        assert not drawn.negatives.mask.any()
        assert not drawn.positives.embeddings.any()
        assert (drawn.negatives.numbers.columns == -1).all()
    assert sample(bank, jax.random.key(0), batch).positives.mask.any()


def test_bank_keeps_its_dtype_and_blocks_gradient():
    bank, batch = filled(0, batches=6, dtype=jnp.bfloat16, missing=0.0)
    assert bank.rows.embeddings["video"].dtype == jnp.bfloat16
    sample = sampler(("video", "audio"), sampling_of())
    drawn = sample(bank, jax.random.key(0), batch)
    assert drawn.positives.embeddings.dtype == jnp.bfloat16

    def total(embeddings, held):
        changed = batch._replace(embeddings=embeddings)
        some = bank.replace(rows=bank.rows.replace(embeddings=held))
        drawn = sample(some, jax.random.key(0), changed)
        inserted = insert(some, changed).rows.embeddings
        leaves = (drawn.positives.embeddings, drawn.negatives.embeddings, *inserted.values())
        return sum(leaf.astype(jnp.float32).sum() for leaf in leaves)

    gradient = jax.grad(total, argnums=(0, 1))(batch.embeddings, bank.rows.embeddings)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def bank_and_anchor(rows, anchor, *, playback=0, present=True):
    """A full bank of videos without audio, each row of a source of its own, and one anchor."""
    size, dim = np.shape(rows)
    numbers = np.zeros((size, 4), np.int32)
    numbers[:, :2] = np.arange(size)[:, None]
    numbers[:, 2] = playback
    bank = feature_bank.FeatureBank(
        rows=BankRows(
            embeddings={"video": jnp.asarray(rows, jnp.float32), "audio": jnp.zeros((size, dim))},
            presence=jnp.broadcast_to(jnp.asarray(present, jnp.uint8), size),
            numbers=RowNumbers(jnp.asarray(numbers)),
        ),
        inserted=jnp.asarray(size, jnp.int32),
    )
    video = jnp.broadcast_to(jnp.asarray(anchor, jnp.float32), (1, 2, dim))
    views = Views(
        embeddings={"video": video, "audio": 0 * video},
        present={"video": jnp.ones((1, 2), bool), "audio": jnp.zeros((1, 2), bool)},
        playback={modality: jnp.zeros((1, 2), jnp.int32) for modality in MODALITIES},
        label=jnp.zeros((1, 0), jnp.int32),
        source_id=jnp.array([-5], jnp.int32),
        record_index=jnp.array([0], jnp.int32),
    )
    return bank, views


def one_anchor(scores, **rows):
    """The same, with the given similarities of the rows to every anchor."""
    return bank_and_anchor(np.stack([scores, np.zeros(len(scores))], axis=1), [1, 0], **rows)


def test_too_few_eligible_rows_give_no_positives():
    """16 eligible rows of 64 suffice for 4 ranks, not for 5."""
    bank, anchors = one_anchor(np.linspace(0.5, 0.4, 64), present=np.arange(64) % 4 == 0)
    for ranks, some in ((4, True), (5, False)):
        sampling = sampling_of(positive_ranks=ranks, negative_candidates=64)
        drawn = sampler(("video", "video"), sampling)(bank, jax.random.key(0), anchors)
        assert drawn.positives.mask.any() == some
        assert drawn.negatives.mask.all()


@pytest.mark.parametrize("size", [64, 1024, 1000, 2048])
@pytest.mark.parametrize("ranks", [1, 7, 40])
def test_ranking_in_blocks_keeps_the_order_of_rows_where_similarities_tie(size, ranks):
    rng = np.random.default_rng(size + ranks)
    rows = np.round(rng.normal(size=(size, 2)) * 4)  # many are alike
    queries = np.round(rng.normal(size=(3, 2)) * 2)
    source, usable = rng.integers(0, 5, size), rng.random(size) < 0.7
    bank, _ = bank_and_anchor(rows, np.zeros(2))
    numbers = bank.rows.numbers.columns.at[:, 1].set(source)
    scores, ranked = bank_ranking.rank(
        bank_ranking.Anchors(
            [jnp.asarray(queries, jnp.float32)], jnp.arange(3), jnp.array([True, True, False])
        ),
        bank.rows.replace(numbers=RowNumbers(numbers)),
        jnp.asarray(usable),
        ranks,
        pairs=[("video", "video")],
        means=[],
    )
    for number in range(2):
        similarity = np.where(usable & (source != number), rows @ queries[number], -np.inf)
        order = np.argsort(-similarity, kind="stable")[:ranks]
        np.testing.assert_array_equal(scores[number], similarity[order])
        found = np.isfinite(similarity[order])
        np.testing.assert_array_equal(ranked[number][found], order[found])
    assert (scores[2] == -np.inf).all()


def test_a_key_of_another_generator_draws_too():
    bank, batch = filled(0, batches=5)
    keys = (jax.random.fold_in(jax.random.key(0, impl="rbg"), step) for step in range(2))
    sample = sampler(TERMS[0], sampling_of())
    one, other = (sample(bank, key, batch).negatives.numbers.columns for key in keys)
    assert (one != other).any()


def test_tiles_change_nothing(monkeypatch):
    bank, batch = filled(3, batches=5)
    whole = sampler(("video", "audio"), sampling_of("agreement"))(bank, jax.random.key(0), batch)
    monkeypatch.setattr(bank_ranking, "_TILE_ELEMENTS", 3 * SIZE)  # 8 anchors in 3 tiles
    monkeypatch.setattr(bank_ranking, "_BLOCK_ROWS", 8)
    again = sampler.__wrapped__(("video", "audio"), sampling_of("agreement"))
    tiled = again(bank, jax.random.key(0), batch)
    assert whole.positives.mask.any()
    jax.tree.map(np.testing.assert_array_equal, whole, tiled)


@pytest.mark.parametrize("shards", [1, 2])
def test_restarting_insertion_numbers_changes_no_draw(shards):
    """Rows, their order, draws and ages are those of a bank whose numbers do not start over."""
    period = (2**30 - 1) // SIZE * SIZE
    rng = np.random.default_rng(5)
    far, anchors = filled(5, batches=SIZE // (2 * VIDEOS), missing=0.0)
    ahead = period - SIZE  # one turn of the ring before the numbers start over
    numbers = RowNumbers(far.rows.numbers.columns.at[:, 0].add(ahead))
    near = far.replace(rows=far.rows.replace(numbers=numbers), inserted=far.inserted + ahead)
    # Noise and candidates depend on the numbers: no noise, and all rows are candidates.
    sampling = sampling_of(temperature=1e-6, negative_candidates=SIZE)
    sample = sampler(("video", "audio"), sampling)
    seen = []
    for _ in range(SIZE // VIDEOS):
        batch = random_batch(rng, VIDEOS, DIM, SOURCES, 0.0)
        far, near = insert(far, batch), insert(near, batch)
        seen.append(int(near.inserted))
        found = []
        for bank in (far, near):
            assert feature_bank.is_full(bank)
            assert len(np.unique(bank.rows.numbers.insertion)) == SIZE
            drawn = sample(bank, jax.random.key(0), anchors)
            metrics = bank_health.sample_metrics(
                bank, drawn, on_device(batch), modality="video", label_names=LABELS
            )
            assert 1 <= metrics["age_rows"][0] <= SIZE
            moved = feature_bank.redistribute(bank, global_batch_size=VIDEOS, shards=shards)
            rows = [
                (b.rows.embeddings, b.rows.presence, b.rows.numbers.columns[:, 1:])
                for b in (bank, moved)
            ]
            numbers = [np.asarray(b.rows.numbers.insertion) for b in (bank, moved)]
            found.append((rows, metrics, [(kind.embeddings, kind.mask) for kind in drawn], numbers))
        (*far_found, far_numbers), (*near_found, near_numbers) = found
        jax.tree.map(np.testing.assert_array_equal, far_found, near_found)
        for one, other in zip(far_numbers, near_numbers, strict=True):
            np.testing.assert_array_equal((other - one - ahead) % period, 0)
    assert max(seen) < SIZE + period < 2**31
    assert SIZE in seen


def kinds(playback, label):
    return dict(
        zip(("speed", "direction", *LABELS), (playback // 2, playback % 2, *label), strict=True)
    )


def own_kinds(batch, i, view):
    return kinds(batch.playback["video"][i, view], batch.label[i])


def agreement(pairs):
    """Fraction of pairs that agree, and their number, by kind; −1 is unknown."""
    found = {
        name: [one[name] == other[name] for one, other in pairs if min(one[name], other[name]) >= 0]
        for name in pairs[0][0]
    }
    return {name: (np.mean(values), len(values)) for name, values in found.items()}


def test_sample_metrics():
    bank, batch = filled(4, batches=7)
    batch.present["video"][:2] = [[True], [False]]
    batch.label[:, 0] = 0, 1, 2, -1
    drawn = sampler(("video", "audio"), sampling_of())(bank, jax.random.key(0), batch)
    views, options = on_device(batch), {"modality": "video", "label_names": LABELS}
    metrics = bank_health.sample_metrics(bank, drawn, views, **options)
    none = drawn.positives._replace(mask=jnp.zeros_like(drawn.positives.mask))
    without = bank_health.sample_metrics(bank, drawn._replace(positives=none), views, **options)
    drawn = jax.tree.map(np.asarray, drawn)
    mask = drawn.positives.mask
    assert mask.any()
    assert not mask.all()
    ages = 7 * 2 * VIDEOS - drawn.positives.numbers.insertion[mask]
    np.testing.assert_allclose(metrics["age_rows"], (ages.mean(), mask.sum()), rtol=1e-6)
    assert ages.min() >= 1
    assert ages.max() <= SIZE
    np.testing.assert_allclose(metrics["positives"][0], mask.sum(-1).mean(), rtol=1e-6)
    for kind, (_, mask, numbers) in zip(("positive", "negative"), drawn, strict=True):
        rows = [((i, view), numbers[i, view, r]) for i, view, r in np.argwhere(mask)]
        pairs = [(own_kinds(batch, *at), kinds(r.playback("video"), r.label)) for at, r in rows]
        for name, expected in agreement(pairs).items():
            np.testing.assert_allclose(metrics[f"{kind}_share/{name}"], expected, rtol=1e-6)
            assert 0 < expected[0] < 1
    assert without["age_rows"] == (0, 0)
    assert without["positive_share/motion"] == (0, 0)


def test_base_rates_count_pairs_of_other_sources():
    batch = random_batch(np.random.default_rng(0), 12, DIM, SOURCES)
    batch.label[:, 0] = 0  # one class: always agrees
    bank = feature_bank.create(SIZE, DIM, jnp.float32, labels=2)
    rates = bank_health.bank_metrics(bank, on_device(batch), label_names=LABELS)
    views = np.argwhere(batch.present["video"] | batch.present["audio"])
    pairs = [
        (own_kinds(batch, *one), own_kinds(batch, *other))
        for one, other in itertools.product(views, views)
        if batch.source_id[one[0]] != batch.source_id[other[0]]
    ]
    for name, expected in agreement(pairs).items():
        np.testing.assert_allclose(rates[f"base_rate/{name}"], expected, rtol=1e-6)
    assert rates["base_rate/motion"][0] == 1 > rates["base_rate/material"][0] > 0
    assert rates["fill"][0] == 0


def test_row_drift_is_the_cosine_with_rows_of_the_own_source_by_age():
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, VIDEOS, DIM, SOURCES) for _ in range(8)]
    bank, model = feature_bank.create(SIZE, DIM, jnp.float32, labels=2), BankModel(SIZE)
    for batch in batches[:-1]:
        bank = insert(bank, batch)
        model.insert(batch)
    batch = batches[-1]
    found = bank_health.bank_metrics(bank, on_device(batch), label_names=LABELS)
    cosines = {"newer": [], "older": []}
    for i, view in np.argwhere(batch.present["audio"]):
        for row in model.rows:
            if row["has_audio"] and row["source_id"] == batch.source_id[i]:
                half = "older" if model.inserted - row["insertion"] > SIZE // 2 else "newer"
                cosines[half].append(row["audio"] @ batch.embeddings["audio"][i, view])
    for half, values in cosines.items():
        assert values
        result = found[f"audio_same_source_similarity/{half}"]
        np.testing.assert_allclose(result, (np.mean(values), len(values)), rtol=1e-5)


def pod_bytes(size, *, shards=256, terms=(("video", "audio"),)):
    sampling = sampling_of(
        "agreement", num_positives=1, positive_ranks=256, negative_candidates=2048
    )
    return exchange_bytes(
        size=size,
        dim=128,
        dtype=jnp.bfloat16,
        labels=1,
        global_batch_size=64 * 256,
        shards=shards,
        terms=terms,
        sampling=sampling,
    )


def test_exchange_bytes_on_a_pod():
    """Gathering 65,536 rows is 33 MB, merging 256 nearest rows per anchor 67 MB."""
    numbers = 65_536 * 5 * 4
    small = pod_bytes(65_536)
    assert small.gather - numbers - 65_536 == 65_536 * 128 * 2 * 2  # 33.6 MB
    assert small.merge - numbers > 128 * 256 * 256 * 8  # 67.1 MB of nearest rows alone
    million = pod_bytes(2**20)
    assert million.merge < million.gather
    assert pod_bytes(65_536, shards=1) == (0, 0)


def test_equal_collectives_of_terms_count_once():
    terms = [("video", "video"), ("video", "audio"), ("audio", "video")]
    alone = [pod_bytes(65_536, terms=[term]) for term in terms]
    together = pod_bytes(65_536, terms=terms)
    assert together.gather == alone[0].gather == alone[1].gather
    assert max(one.merge for one in alone) < together.merge < sum(one.merge for one in alone)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((40, 12, 1), "bank of 40 rows must be .* of the 24.* use 24 or 48"),
        ((16, 12, 1), "bank of 16 rows.*use 24"),
        ((24, 12, 8), "batch of 12 videos does not divide over 8 data shards"),
        ((1 << 31, 4, 1), "bank of 2147483648 rows is too large: they are numbered in 32 bits"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_those_that_do(numbers, message):
    size, videos, shards = numbers
    with pytest.raises(UserError, match=message):
        feature_bank.check_size(size, global_batch_size=videos, shards=shards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive_ranks": 2}, r"num_positives = 3 .* drawn from positive_ranks = 2"),
        ({"num_negatives": -1}, "num_negatives = -1 cannot be drawn"),
        ({"space": "nearest"}, "space is 'nearest'; use one of same, cross, agreement"),
        ({"ranking": "nearest"}, "ranking is 'nearest'"),
        ({"negative_sampling": "softmax"}, "negative_sampling is 'softmax'"),
        ({"negative_offset": 1.0}, "negative_offset is 1"),
        ({"num_negatives": 0, "negative_candidates": 0}, "negative_candidates is 0"),
        ({"temperature": 0.0, "positive_sampling": "uniform"}, "temperature is 0"),
    ],
)
def test_settings_of_sampling_that_make_no_sense_are_refused(settings, message):
    sampling_of("same", "uniform", temperature=0.0, num_positives=0, num_negatives=1)
    with pytest.raises(UserError, match=message):
        sampling_of(**settings)


def test_a_batch_that_does_not_fill_the_bank_evenly_is_refused():
    bank, _ = filled(0, batches=1)
    with pytest.raises(UserError, match="multiple of the 6 rows"):
        insert(bank, random_batch(np.random.default_rng(0), 3, DIM, SOURCES))
