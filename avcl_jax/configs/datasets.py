"""Data sets: one row each, from which the presets of all tasks take records, splits and labels.

A new data set is a row here and its collection in data_prep/collections; docs/data has a page on
each. The protocols that test a frozen encoder have a preset for every row; those of the demo, and
linear_probe.py:esc10, were run whole (docs/protocols.md), others not: their data are not here.
"""

import dataclasses
from collections.abc import Collection

from ml_collections import ConfigDict

from avcl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A prepared data set."""

    directory: str  # of the records
    prepare: str  # command or page that makes them
    modality: str  # from which classes are recognised
    label: str = "class"  # one or several classes per record
    train: str = "train"  # splits
    test: str = "test"
    # Training and test records, one pair per official split.
    selections: tuple[tuple[str, str], ...] = (("", ""),)
    # Label whose classes are held out in turn to choose the regularisation of a linear classifier;
    # "" for random folds of sources.
    groups: str = ""


_FOLEY = ("data/foley/records", "avcl-data demo --out data/foley")
_THREE_SPLITS = tuple((f"split{n}=train", f"split{n}=test") for n in (1, 2, 3))
_FIVE_FOLDS = tuple((f"fold!={n}", f"fold={n}") for n in (1, 2, 3, 4, 5))
_ACTIONS = ("video", "class", "all", "all", _THREE_SPLITS)
_ESC = ("docs/data/esc50.md", "audio", "class", "all", "all", _FIVE_FOLDS, "fold")
DATASETS = {
    "demo": DataSet(*_FOLEY, "video", "motion"),
    "demo_audio": DataSet(*_FOLEY, "audio", "material"),
    # Your own: --config.data.directory=D, and where classes are needed --config.data.label=L.
    "records": DataSet("", "avcl-data prepare VIDEOS/ --out DIRECTORY", "video"),
    "kinetics400": DataSet("data/kinetics400", "docs/data/kinetics.md", "video", test="val"),
    "kinetics600": DataSet("data/kinetics600", "docs/data/kinetics.md", "video", test="val"),
    "vggsound": DataSet("data/vggsound", "docs/data/vggsound.md", "audio"),
    "audioset": DataSet("data/audioset", "docs/data/audioset.md", "audio", test="eval"),
    "ucf101": DataSet("data/ucf101", "docs/data/ucf101.md", *_ACTIONS),
    "hmdb51": DataSet("data/hmdb51", "docs/data/hmdb51.md", *_ACTIONS),
    "esc50": DataSet("data/esc50", *_ESC),
    "esc10": DataSet("data/esc10", *_ESC),
}


def check_preset(preset: str, known: Collection[str]) -> None:
    """Raises `UserError` with the names of the known presets for another one."""
    if preset not in known:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(known)}")


def find(name: str) -> DataSet:
    """Returns the row of a data set, or raises `UserError` if there is none."""
    check_preset(name, DATASETS)
    return DATASETS[name]


# True: test on records of pretraining; leave out records without the class or the modality.
_TESTED = {"allow_trained_on": False, "leave_out": False}


def training(name: str) -> ConfigDict:
    """Returns the section `data` of pretraining: the training records, without labels."""
    row = find(name)
    c = ConfigDict(dict(directory=row.directory, prepare=row.prepare, split=row.train))
    c.select = ""  # records by label, for instance "fold!=1": avcl_jax/data/selection.py
    return c


def testing(name: str) -> ConfigDict:
    """Returns the section `data` of a protocol without training: the test records."""
    c = training(name)
    c.split = find(name).test
    c.update(_TESTED)
    return c


def labelled(name: str) -> ConfigDict:
    """Returns the section `data` of a protocol that trains and tests on labels."""
    row = find(name)
    c = ConfigDict(dict(directory=row.directory, prepare=row.prepare, label=row.label))
    c.update(train_split=row.train, test_split=row.test)
    # One entry per official split: LABEL=VALUE, LABEL=VALUE|VALUE, LABEL!=VALUE; "" is all.
    c.train_select, c.test_select = zip(*row.selections, strict=True)
    c.update(_TESTED)
    return c
