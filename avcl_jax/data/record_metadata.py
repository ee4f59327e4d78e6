"""features.json and dataset_info.json of a prepared directory, by TensorFlow Datasets itself.

TFDS needs TensorFlow to write TFRecords but not to write metadata. Importing it takes a second or
two, so only preparation imports this module; reading needs no TFDS.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from avcl_jax.data.record_files import TFRECORD
from avcl_jax.data.record_format import FORMAT_VERSION, LABEL_PREFIX
from avcl_jax.data.records import ShardInfo
from avcl_jax.paths import absolute_path

_DESCRIPTION = (
    "Audio-visual clips prepared by avcl_jax's data_prep: JPEG frames with the time of each, mono "
    "PCM, and labels (-1 is unknown). All times are seconds on the clip's own timeline."
)


def record_features(
    class_names: Mapping[str, Sequence[str]], multilabel: Collection[str]
) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record, whose labels have these `class_names` and no prefix.

    `tfds.features.Video` and `Audio` need TensorFlow when they are constructed. A video is stored
    as the sequence of images that `Video` is, and a waveform as the tensor that `Audio` is.
    """

    def raw(dtype: type, *shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    def label_feature(label: str, names: Sequence[str]) -> tfds.features.FeatureConnector:
        feature = tfds.features.ClassLabel(names=list(names))
        return tfds.features.Sequence(feature) if label in multilabel else feature

    frame = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(doc="Name of the record, unique in its data set"),
            "source": tfds.features.Text(doc="What the clip was cut from"),
            "video": tfds.features.Sequence(frame, doc="Upright frames; none: no picture"),
            "frame_seconds": raw(np.float64, None),
            "audio": raw(np.int16, None),
            "sample_rate_hz": tfds.features.Scalar(np.int64),
            "audio_start_seconds": raw(np.float64),
            "duration_seconds": raw(np.float64),
            "height": tfds.features.Scalar(np.int64),
            "width": tfds.features.Scalar(np.int64),
            "is_still": tfds.features.Scalar(np.bool_, doc="Nothing moves in the video"),
            **{
                LABEL_PREFIX + label: label_feature(label, names)
                for label, names in sorted(class_names.items())
            },
        }
    )


def write_dataset_metadata(
    directory: epath.PathLike,
    *,
    name: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str] = (),
    splits: Mapping[str, Sequence[ShardInfo]],
    file_format: str = TFRECORD,
) -> None:
    """Writes features.json, dataset_info.json and the class names, dataset_info.json last.

    Args:
        directory: directory of the shards of all splits.
        name: first part of the shards' names; lower case, digits and underscores.
        class_names: names of the classes, for each label.
        multilabel: labels that allow several classes per record.
        splits: shards of each split, in order.
        file_format: format of the shards.
    """
    directory = absolute_path(directory)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(FORMAT_VERSION),
        data_dir=str(directory),
        module_name="data_prep",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=_DESCRIPTION,
        features=record_features(class_names, multilabel),
    )
    info.set_file_format(file_format)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, filetype_suffix=file_format
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard.num_records for shard in shards],
                    num_bytes=sum(shard.num_bytes for shard in shards),
                    filename_template=template.replace(split=split),
                )
                for split, shards in sorted(splits.items())
            ]
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        written = sorted(epath.Path(scratch).iterdir(), key=lambda p: p.name == "dataset_info.json")
        for source in written:
            temporary = directory / f"{source.name}.tmp"
            temporary.write_bytes(source.read_bytes())
            temporary.replace(directory / source.name)
