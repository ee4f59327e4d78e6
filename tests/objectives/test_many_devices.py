"""Eight devices hold, sample and lose the same as one, and exchange no more than was counted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.objectives.bank_exchange import exchange_bytes
from tests.hlo import collective_bytes
from tests.objectives.many_devices import (
    BATCHES,
    EXCHANGES,
    LAYOUTS,
    SHARDS,
    TERMS,
    VIDEOS,
    main,
    sampling_of,
)

INSERTION = "rows/numbers/columns"  # in column 0


@pytest.fixture(scope="module")
def results(run_with_cpu_devices, tmp_path_factory):
    path = tmp_path_factory.mktemp("many_devices") / "results.npz"
    run_with_cpu_devices(SHARDS, main.__module__, str(path))
    return dict(np.load(path))


def fields(results, prefix):
    found = {
        name[len(prefix) :]: values for name, values in results.items() if name.startswith(prefix)
    }
    assert found
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", ["gather", "merge"])
def test_bank_holds_the_same_rows_as_a_set(results, layout, exchange):
    one = fields(results, f"one/{exchange}/bank/")
    many = fields(results, f"{layout}/{exchange}/bank/")
    order = [np.argsort(bank[INSERTION][:, 0], kind="stable") for bank in (one, many)]
    for name in one:
        if one[name].ndim:
            np.testing.assert_array_equal(one[name][order[0]], many[name][order[1]], err_msg=name)
    written = min(2 * VIDEOS * BATCHES, EXCHANGES[exchange][0])
    assert (one[INSERTION][:, 0] >= 0).sum() == written
    assert one["inserted"] == many["inserted"] == 2 * VIDEOS * BATCHES


@pytest.mark.parametrize("exchange", ["gather", "merge"])
def test_every_shard_holds_only_what_its_device_computed(results, exchange):
    insertion = results[f"data/{exchange}/bank/{INSERTION}"][:, 0].reshape(SHARDS, -1)
    shard = np.where(insertion >= 0, insertion % (2 * VIDEOS) // (2 * VIDEOS // SHARDS), -1)
    for device in range(SHARDS):
        assert set(shard[device]) <= {device, -1}
        assert device in shard[device]
    there = fields(results, f"data/{exchange}/bank/")
    moved = fields(results, f"moved/{exchange}/bank/")  # redistributed from one device
    for name in there:
        np.testing.assert_array_equal(there[name], moved[name], err_msg=name)
    assert not np.array_equal(results[f"one/{exchange}/bank/{INSERTION}"], moved[INSERTION])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_same_rows_are_sampled_for_the_same_loss_and_gradient(results, layout, exchange):
    one = fields(results, f"one/{exchange}/drawn/")
    many = fields(results, f"{layout}/{exchange}/drawn/")
    for name in one:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)
    for number in range(len(TERMS)):
        mask = one[f"{number}/positives/mask"]
        assert mask.any()
        assert not mask.all()  # videos lack a modality
    for name in ("loss", "gradient"):
        one, many = results[f"one/{exchange}/{name}"], results[f"{layout}/{exchange}/{name}"]
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)
        assert np.abs(one).max() > 1e-3
    shapes = fields(results, f"{layout}/{exchange}/unranked/")  # negatives need no ranks
    assert [tuple(shape[:3]) for shape in shapes.values()] == [(VIDEOS, 2, 0), (VIDEOS, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_devices_exchange_what_was_counted_and_the_smaller(results, layout, exchange):
    size, dim, space = EXCHANGES[exchange]
    counted = exchange_bytes(
        size=size,
        dim=dim,
        dtype=jnp.bfloat16,
        labels=2,
        global_batch_size=VIDEOS,
        shards=SHARDS,
        terms=TERMS,
        sampling=sampling_of(space),
    )
    way = "gather" if exchange == "gather" else "merge"
    assert min(counted) == getattr(counted, way)  # both ways are run by this test
    measured = results[f"{layout}/{exchange}/sample_bytes"]
    assert measured == min(counted)
    assert (results[f"{layout}/{exchange}/all_to_all_bytes"] > 0) == (way == "merge")
    assert results[f"{layout}/{exchange}/insert_bytes"] == 0


def test_no_device_holds_the_whole_matrix_of_a_large_batch(results):
    """1,024 videos × 2 views on 8 devices: a whole matrix of similarities would be 16 MiB."""
    whole = (2 * 1024) ** 2 * 4
    assert results["large/temporary_bytes"] < whole
    # Embeddings and their gradient go round, a few times their 1 MiB; similarities do not.
    assert results["large/collective_bytes"] < 4 * 2**20


def test_collective_bytes_reads_hlo():
    text = """
    %a = u16[128,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
    %b = (u32[1,2,3]{2,1,0}, /*index=1*/u32[1,2,3]{2,1,0}) all-to-all(%y, %z), channel_id=2
    %c = pred[7]{0} all-gather(%m), dimensions={0}
    ROOT %d = f32[] all-reduce(%n), to_apply=%add
    %e = f32[128,8]{1,0} fusion(%a), calls=%all-gather_fusion
    """
    assert collective_bytes(text) == {
        "all-gather": 128 * 8 * 2 + 7,
        "all-to-all": 2 * 6 * 4,
        "all-reduce": 4,
    }
    with pytest.raises(ValueError, match="asynchronous"):
        collective_bytes("%a = (f32[2], f32[16]) all-gather-start(%x)")
