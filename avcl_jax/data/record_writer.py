"""Prepared data sets, written without TensorFlow: shards, and metadata by TensorFlow Datasets.

TFDS needs TensorFlow to write TFRecords but not to write metadata. Importing it takes a second or
two, which the workers that write shards do not have to wait for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_files import TFRECORD
from avcl_jax.data.record_format import (
    FORMAT_VERSION,
    LABEL_PREFIX,
    STORED,
    Feature,
    Record,
    serialize_parts,
)
from avcl_jax.data.record_index import index_row, index_table
from avcl_jax.paths import absolute_path, write_bytes

_DESCRIPTION = (
    "Audio-visual clips prepared by avcl_jax's data_prep: JPEG frames with the time of each, mono "
    "PCM, and labels (-1 is unknown). All times are seconds on the clip's own timeline."
)


class RecordWriter:
    """Context manager that writes one shard; a file appears under its name only when complete.

    An exception inside the block removes what was written.
    """

    def __init__(self, path: epath.PathLike, file_format: str = TFRECORD):
        """Takes the path of the shard, and its format, one of `FILE_FORMATS`."""
        self._file = record_files.create(epath.Path(path), file_format)
        self._rows: list[dict[str, Any]] = []

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises ValueError if it contradicts itself, OSError if it cannot be written.
        """
        header, rest = serialize_parts(record)
        payload = header + rest
        self._append(payload)
        self._rows.append(index_row(record, payload, len(header)))

    def table(self) -> pa.Table:
        """Returns the index of the records written so far."""
        return index_table(self._rows)

    def __enter__(self) -> RecordWriter:
        self._append = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def record_features(class_names: Mapping[str, Sequence[str]], multilabel: Collection[str]) -> Any:
    """Returns the TFDS `FeaturesDict` of a record, whose labels have these `class_names`.

    `tfds.features.Video` and `Audio` need TensorFlow when they are constructed. A video is stored
    as the sequence of images that `Video` is, and a waveform as the tensor that `Audio` is.
    """
    from tensorflow_datasets import features

    def make(feature: Feature) -> Any:
        if feature.kind == "Text":
            return features.Text(doc=feature.doc)
        if feature.kind == "Sequence":
            frame = features.Image(shape=(None, None, 3), encoding_format="jpeg")
            return features.Sequence(frame, doc=feature.doc)
        dtype = np.dtype(feature.dtype)
        if feature.kind == "Scalar":
            return features.Scalar(dtype, doc=feature.doc)
        shape = (None,) if feature.is_array else ()
        return features.Tensor(shape=shape, dtype=dtype, encoding=feature.encoding, doc=feature.doc)

    labels = {label: features.ClassLabel(names=list(n)) for label, n in sorted(class_names.items())}
    return features.FeaturesDict(
        {name: make(feature) for name, feature in STORED.items()}
        | {
            LABEL_PREFIX + label: features.Sequence(classes) if label in multilabel else classes
            for label, classes in labels.items()
        }
    )


def write_dataset_metadata(
    directory: epath.PathLike,
    *,
    name: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str] = (),
    splits: Mapping[str, Sequence[tuple[int, int]]],
    file_format: str = TFRECORD,
) -> None:
    """Writes features.json, dataset_info.json and the class names, dataset_info.json last.

    Args:
        directory: directory of the shards of all splits.
        name: first part of the shards' names; lower case, digits and underscores.
        class_names: names of the classes, for each label.
        multilabel: labels that allow several classes per record.
        splits: number of records, and bytes of their payloads, of each shard of each split.
        file_format: format of the shards.
    """
    import tensorflow_datasets as tfds

    directory = absolute_path(directory)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(FORMAT_VERSION),
        data_dir=str(directory),
        module_name="data_prep",
    )
    features = record_features(class_names, multilabel)
    info = tfds.core.DatasetInfo(builder=identity, description=_DESCRIPTION, features=features)
    info.set_file_format(file_format)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, filetype_suffix=file_format
    )
    entries = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[num_records for num_records, _ in shards],
            num_bytes=sum(num_bytes for _, num_bytes in shards),
            filename_template=template.replace(split=split),
        )
        for split, shards in sorted(splits.items())
    ]
    info.set_splits(tfds.core.splits.SplitDict(entries))
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        written = sorted(epath.Path(scratch).iterdir(), key=lambda p: p.name == "dataset_info.json")
        for source in written:
            write_bytes(directory / source.name, source.read_bytes())
