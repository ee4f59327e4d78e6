"""tf.train.Example and tf.train.SequenceExample, without TensorFlow.

Descriptors of our own in a private pool: TensorFlow and TFDS register the same names in the default
one, and importing TFDS takes a second in every worker.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, text_format

# Raised when parsing bytes of another message.
DecodeError = message.DecodeError


def _field(name: str, number: int, kind: str, *options: str) -> str:
    """Returns a field of a scalar type, or of the message type `kind`, as text."""
    kind = f"type: {kind}" if kind.startswith("TYPE") else f'type_name: ".tensorflow.{kind}"'
    return f'field {{ name: "{name}" number: {number} {kind} {" ".join(options)} }}'


def _message(name: str, *content: str) -> str:
    return f'message_type {{ name: "{name}" {" ".join(content)} }}'


def _map_message(name: str, field: str, value: str) -> str:
    """Returns a message with `map<string, value>` as field 1, as protoc spells it."""
    entry = f"{value}Entry"
    fields = _field("key", 1, "TYPE_STRING") + _field("value", 2, value)
    nested = f'nested_type {{ name: "{entry}" options {{ map_entry: true }} {fields} }}'
    return _message(name, nested, _field(field, 1, f"{name}.{entry}", _REPEATED))


_REPEATED, _ONEOF = "label: LABEL_REPEATED", "oneof_index: 0"
_FILE = " ".join(
    (
        'name: "avcl_jax/example.proto" package: "tensorflow" syntax: "proto3"',
        _message("BytesList", _field("value", 1, "TYPE_BYTES", _REPEATED)),
        _message("FloatList", _field("value", 1, "TYPE_FLOAT", _REPEATED)),
        _message("Int64List", _field("value", 1, "TYPE_INT64", _REPEATED)),
        _message(
            "Feature",
            'oneof_decl { name: "kind" }',
            _field("bytes_list", 1, "BytesList", _ONEOF),
            _field("float_list", 2, "FloatList", _ONEOF),
            _field("int64_list", 3, "Int64List", _ONEOF),
        ),
        _map_message("Features", "feature", "Feature"),
        _message("FeatureList", _field("feature", 1, "Feature", _REPEATED)),
        _map_message("FeatureLists", "feature_list", "FeatureList"),
        _message("Example", _field("features", 1, "Features")),
        _message(
            "SequenceExample",
            _field("context", 1, "Features"),
            _field("feature_lists", 2, "FeatureLists"),
        ),
    )
)


@functools.cache
def _class(name: str) -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.{name}"))


def example_class() -> Any:
    """Returns the message class tf.train.Example."""
    return _class("Example")


def sequence_example_class() -> Any:
    """Returns the message class tf.train.SequenceExample."""
    return _class("SequenceExample")
