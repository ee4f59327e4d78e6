"""The task `video_retrieval` on the small data set, and selections of UCF101."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from avcl_jax.configs import retrieval as config_file
from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import SelectionError
from avcl_jax.errors import UserError
from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
from avcl_jax.evaluation.retrieval import video_retrieval
from avcl_jax.export.runs import open_encoders
from tests.evaluation.conftest import CLASS_NAMES, small_record, write_records


def _config(records, small_run):
    c = config_file.get_config("demo")
    c.unlock()
    c.encoder = str(small_run[1])
    c.data.directory = str(records)
    c.features.update({"clips": 2, "speeds": (1, 2)})
    c.execution.chunk = 8
    c.evaluation.recall_at = (1, 5, 50)
    c.bootstrap.resamples = 20
    return c


def test_one_command_gives_figures_of_exact_neighbours_that_repeat(
    small_records, small_run, tmp_path
):
    config = _config(small_records, small_run)
    first = video_retrieval(config, tmp_path / "a")
    second = video_retrieval(config, tmp_path / "b")
    assert first["metrics"] == second["metrics"]
    assert set(first["metrics"]) == {"r1", "r5", "r1_random", "r5_random"}  # the gallery holds 24
    assert (first["details"]["queries"], first["details"]["gallery"]) == (16, 24)

    # The same from the encoder itself, raw frames, and scikit-learn.
    encoder = open_encoders(small_run[1]).encoders["video"]
    sets = {}
    for split in ("test", "train"):
        records = RecordDataset(small_records, split)
        sets[split] = records.labels["motion"], []
        for number in range(len(records)):
            frames = decode_jpegs(records[number].frames)
            clips = []
            for speed in (1, 2):
                # 3 s at 16 pictures/s; clips of 0.25 s times speed, first and last.
                step = 4 * speed
                clips += [frames[start : start + step : speed] for start in (0, 48 - step)]
            features = np.asarray(encoder.apply(encoder.params, np.stack(clips)))
            sets[split][1].append(features.mean(axis=0))
    labels, queries = sets["test"]
    gallery_labels, gallery = sets["train"]
    model = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(gallery)
    found = gallery_labels[model.kneighbors(queries, return_distance=False)]
    assert first["metrics"]["r1"]["value"] == np.mean(found[:, 0] == labels)
    assert first["metrics"]["r5"]["value"] == np.mean((found == labels[:, None]).any(axis=1))
    units = read_outcomes(tmp_path / "a" / OUTCOMES)
    assert units.units[3] == "test/3"
    assert set(first["details"]["r1_by_class"]) == {"across", "down"}
    assert np.mean(list(first["details"]["r1_by_class"].values())) == np.mean(found[:, 0] == labels)
    assert first["details"]["left_out"] == {"query": 0, "gallery": 0}
    page = (tmp_path / "a" / "report.html").read_text()
    # The first and the last query are shown, each with five results.
    assert all(text in page for text in ("Nearest neighbours", "test/0 (", "test/15 (", "<th>5<"))
    assert "<th>6<" not in page


@pytest.fixture(scope="module")
def split_records(tmp_path_factory):
    """One split `all`, of which a label says which records train, as UCF101 is prepared."""
    records = []
    for number in range(12):
        labels = {"motion": number % 2, "material": 0}
        labels |= {"split1": number % 3 == 0, "split2": number % 3 == 1}
        record = small_record("test", number)
        records.append(dataclasses.replace(record, labels={k: int(v) for k, v in labels.items()}))
    names = CLASS_NAMES | {f"split{n}": ["train", "test"] for n in (1, 2)}
    directory = tmp_path_factory.mktemp("split")
    return write_records(directory, "split", names, {"all": records})


def _split_config(records, small_run):
    c = _config(records, small_run)
    c.data.update(train_split="all", test_split="all")
    c.data.train_select, c.data.test_select = (
        tuple(f"split{n}={side}" for n in (1, 2, 3)) for side in ("train", "test")
    )
    c.baselines.random = False
    return c


def test_the_official_split_is_a_setting(split_records, small_run, tmp_path):
    config = _split_config(split_records, small_run)
    queries = {}
    for number in (1, 2):
        config.data.official_split = number
        video_retrieval(config, tmp_path / str(number))
        queries[number] = read_outcomes(tmp_path / str(number) / OUTCOMES).units
    assert queries == {
        1: ["test/0", "test/3", "test/6", "test/9"],
        2: ["test/1", "test/4", "test/7", "test/10"],
    }
    config.data.official_split = 3
    with pytest.raises(SelectionError, match="not 'split3'"):
        video_retrieval(config, tmp_path / "3")
    config.data.official_split = 4
    with pytest.raises(UserError, match="official_split 4 must be one of 1 to 3"):
        video_retrieval(config, tmp_path / "4")


# What a person sets, and what is said of it before the first record is read.
REFUSED = {
    "16 records are among both": {"data.train_split": "test"},
    "not 'colour'": {"data.label": "colour"},
    r"evaluation.recall_at \(0, 5\) must be whole numbers": {"evaluation.recall_at": (0, 5)},
    "record_pooling 'clips' is for probes": {"features.record_pooling": "clips"},
    r"8 queries are of classes .* first 'down'": {"data.train_select": ("motion=across",)},
    "neither checkpoints nor exported encoders": {"encoder": "tests"},
    "have no video": {
        "data.directory": "FOLDS",
        "data.test_split": "all",
        "data.train_split": "all",
        "data.label": "class",
    },
    "records are among both": {
        "data.directory": "SPLITS",
        "data.test_split": "all",
        "data.train_split": "all",
        "data.test_select": ("split1=test",),
        "data.train_select": ("split2=train",),
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(
    small_records, split_records, fold_records, small_run, tmp_path, monkeypatch, said
):
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    config = _config(small_records, small_run)
    directories = {"FOLDS": str(fold_records), "SPLITS": str(split_records)}
    overrides = {
        key: directories.get(value, value) if isinstance(value, str) else value
        for key, value in REFUSED[said].items()
    }
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=said):
        video_retrieval(config, tmp_path / "w")
