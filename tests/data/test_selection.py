"""Records chosen by label: which ones, views of them, and what is said of mistakes."""

from __future__ import annotations

import dataclasses
import pickle
import re

import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection, SelectionError
from avcl_jax.data.usable_records import UsableRecords
from configs import pretrain
from tests.data.synthetic_records import make_record, write_records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    made = [make_record(number, seconds=7.0, side=16, fps=16.0) for number in range(12)]
    made[3] = dataclasses.replace(made[3], labels={"motion": -1, "material": 0})
    made.append(make_record(12, seconds=0.3, side=16))  # too short for any view
    return RecordDataset(write_records(tmp_path_factory.mktemp("selection") / "r", made), "train")


def expected(records, keep):
    """Positions by reading every record."""
    names = records.class_names["motion"]
    motions = [records[i].labels["motion"] for i in range(len(records))]
    return [i for i, m in enumerate(motions) if m >= 0 and keep(names[m])]


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("motion=b", lambda name: name == "b"),
        ("motion=b|d", lambda name: name in "bd"),
        ("motion!=b", lambda name: name != "b"),
        (" motion = b | d ", lambda name: name in "bd"),
    ],
)
def test_positions_are_those_whose_record_has_the_class(records, text, keep):
    found = Selection.parse(text).positions(records)
    assert found.tolist() == expected(records, keep)
    assert 0 < len(found) < len(records)


def test_conditions_are_joined_and_none_is_everything(records):
    both = Selection.parse("motion!=a;material=a|b").positions(records)
    assert set(both) == set(Selection.parse("motion!=a").positions(records)) & set(
        Selection.of({"material": ("a", "b")}).positions(records)
    )
    np.testing.assert_array_equal(Selection.parse("").positions(records), np.arange(13))


def test_a_selection_reads_what_it_writes():
    selection = Selection.parse("split1=train;fold!=2|3")
    assert str(selection) == "split1=train;fold!=2|3"
    assert Selection.parse(str(selection)) == selection
    assert Selection.of({"split1": "train"}) == Selection.parse("split1=train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motion", "'motion' selects nothing: write LABEL=VALUE"),
        ("motion=", "'motion=' selects nothing"),
        ("motion=a||b", "'motion=a||b' selects nothing"),
        ("split1=train", "has the labels material, motion, not 'split1'"),
        ("motion=z", "has no class 'z', it has a, b, c, d, e"),
        ("motion=a;material=a;motion=b", "has motion=a;material=a;motion=b"),
    ],
)
def test_mistakes_are_one_clear_error(records, text, message):
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        Selection.parse(text).positions(records)
    assert "\n" not in str(caught.value)


def test_usable_records_of_a_selection_are_the_same_records(records):
    spec = experiment.render_spec(pretrain.get_config())
    everything = UsableRecords(records, spec)
    some = UsableRecords(records, spec, Selection.parse("motion=c"))
    assert some.indices.tolist() == [
        i for i in everything.indices if i in expected(records, lambda name: name == "c")
    ]
    assert (some.num_too_short, everything.num_too_short) == (1, 1)
    assert some.fingerprint != everything.fingerprint
    for position, index in enumerate(some.indices.tolist()):
        found, record, use = some[position]
        assert (found, record.record_id) == (index, records.record_ids[index])
        assert use == everything.usable(everything.indices.tolist().index(index))
    again = pickle.loads(pickle.dumps(some))  # as a worker process receives it
    np.testing.assert_array_equal(again.indices, some.indices)
