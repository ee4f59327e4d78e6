"""Fine-tuning with an encoder for each split: which begins where, and that none met its test."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.evaluation.finetune import finetune
from avcl_jax.export.runs import open_encoders
from avcl_jax.training.checkpoint import load_variables
from tests.evaluation.labelled import toy_config, write_encoders, write_labelled

pytestmark = pytest.mark.usefixtures("compiled")
SPLITS = {
    "data.train_select": ("split2=train", "split1=train"),
    "data.test_select": ("split2=test", "split1=test"),
    "epochs": 1.0,
}
FROZEN_STEM = {"freeze": ("encoder/stem",), "batch_norm": "frozen"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("folds") / "records")


@pytest.fixture(scope="module")
def encoders(records, tmp_path_factory):
    """Where encoders of two folds are, each pretrained on all but the test records of its fold."""
    directory = tmp_path_factory.mktemp("encoders")
    data = RecordDataset(records, "all").fingerprint
    for fold in (1, 2):
        write_encoders(directory / f"fold{fold}", seed=fold, data=f"{data} split{fold}!=test")
    return directory / "fold{fold}"


def weights(params) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def _stem(params):
    layers = {name: tree for name, tree in params.items() if name.startswith("stem")}
    assert layers
    return layers


def test_every_split_begins_with_the_encoder_of_its_fold(records, encoders, tmp_path):
    config = toy_config(records, encoders, **FROZEN_STEM, **SPLITS)
    results = finetune(config, tmp_path)
    opened = {fold: open_encoders(str(encoders).replace("{fold}", fold)) for fold in "12"}
    # The first split is fold 2.
    for split, fold in (("split1", "2"), ("split2", "1")):
        frozen, _ = load_variables((tmp_path / split).absolute())
        assert weights(_stem(frozen["params"]["encoder"])) == weights(
            _stem(opened[fold].require("video").params["params"])
        )
    described = results["details"]["splits"]
    assert [entry["encoder"]["path"] for entry in described] == [opened[f].path for f in "21"]
    own = [entry["encoder"]["fingerprint"] for entry in described]
    assert own == [opened[fold].fingerprint for fold in "21"]
    assert results["encoder"]["path"] == str(encoders)
    assert results["encoder"]["fingerprint"] not in own
    report = (tmp_path / "report.html").read_text()
    assert all(source.path in report for source in opened.values())
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("fold1", r"fold1 was pretrained, without labels, on \d+ of the \d+ test records"),
        ("other{fold}", r"other2 was pretrained, without labels, on \d+ of the \d+ test records"),
    ],
)
def test_an_encoder_that_met_the_test_of_its_split_is_refused(
    records, encoders, tmp_path, encoder, message
):
    for fold, other in ((1, 2), (2, 1)):
        (encoders.parent / f"other{fold}").unlink(missing_ok=True)
        (encoders.parent / f"other{fold}").symlink_to(encoders.parent / f"fold{other}")
    config = toy_config(records, encoders.parent / encoder, **SPLITS)
    with pytest.raises(UserError, match=message):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_random_encoder_is_the_same_for_all_splits(records, encoders, tmp_path):
    config = toy_config(records, encoders, init="random", **SPLITS)
    splits = finetune(config, tmp_path)["details"]["splits"]
    assert splits[0]["encoder"] == splits[1]["encoder"]
    assert splits[0]["encoder"]["path"] == f"random like {encoders}"


@pytest.mark.parametrize("test", ["split1!=test", "split1=test|train", "split1=test;class=red", ""])
def test_a_selection_of_no_one_fold_names_no_encoder(records, encoders, tmp_path, test):
    config = toy_config(records, encoders, **{"data.test_select": (test,)})
    with pytest.raises(UserError, match=r"is not one fold, as {fold} in encoder needs") as error:
        finetune(config, tmp_path / "run")
    assert "\n" not in str(error.value)
