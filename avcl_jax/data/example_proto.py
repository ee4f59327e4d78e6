"""tf.train.Example and tf.train.SequenceExample, without TensorFlow.

Descriptors of our own in a private pool: TensorFlow and TFDS register the same names in the default
one, and importing TFDS takes a second in every worker.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

# What parsing raises for bytes that are no such message.
DecodeError = message.DecodeError

_FIELD = descriptor_pb2.FieldDescriptorProto


def _add(to: Any, name: str, number: int, kind: int, **options: Any) -> None:
    options.setdefault("label", _FIELD.LABEL_OPTIONAL)
    to.field.add(name=name, number=number, type=kind, **options)


def _add_map(to: Any, name: str, entry_name: str, value: str) -> None:
    """Adds `map<string, value>` as field 1, as protoc spells it."""
    entry = to.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _add(entry, "key", 1, _FIELD.TYPE_STRING)
    _add(entry, "value", 2, _FIELD.TYPE_MESSAGE, type_name=f".tensorflow.{value}")
    _add(
        to,
        name,
        1,
        _FIELD.TYPE_MESSAGE,
        type_name=f".tensorflow.{to.name}.{entry_name}",
        label=_FIELD.LABEL_REPEATED,
    )


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="avcl_jax/example.proto", package="tensorflow", syntax="proto3"
    )
    lists = ("BytesList", "FloatList", "Int64List")
    for name, kind in zip(
        lists, (_FIELD.TYPE_BYTES, _FIELD.TYPE_FLOAT, _FIELD.TYPE_INT64), strict=True
    ):
        _add(file.message_type.add(name=name), "value", 1, kind, label=_FIELD.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, start=1):
        _add(
            feature,
            name.replace("List", "_list").lower(),
            number,
            _FIELD.TYPE_MESSAGE,
            type_name=f".tensorflow.{name}",
            oneof_index=0,
        )
    _add_map(file.message_type.add(name="Features"), "feature", "FeatureEntry", "Feature")
    _add(
        file.message_type.add(name="FeatureList"),
        "feature",
        1,
        _FIELD.TYPE_MESSAGE,
        type_name=".tensorflow.Feature",
        label=_FIELD.LABEL_REPEATED,
    )
    feature_lists = file.message_type.add(name="FeatureLists")
    _add_map(feature_lists, "feature_list", "FeatureListEntry", "FeatureList")
    example = file.message_type.add(name="Example")
    _add(example, "features", 1, _FIELD.TYPE_MESSAGE, type_name=".tensorflow.Features")
    sequence = file.message_type.add(name="SequenceExample")
    _add(sequence, "context", 1, _FIELD.TYPE_MESSAGE, type_name=".tensorflow.Features")
    _add(sequence, "feature_lists", 2, _FIELD.TYPE_MESSAGE, type_name=".tensorflow.FeatureLists")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


@functools.cache
def example_class() -> Any:
    """Returns the message class tf.train.Example."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName("tensorflow.Example"))


@functools.cache
def sequence_example_class() -> Any:
    """Returns the message class tf.train.SequenceExample."""
    found = _pool().FindMessageTypeByName("tensorflow.SequenceExample")
    return message_factory.GetMessageClass(found)
