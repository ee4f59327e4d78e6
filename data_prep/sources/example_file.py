"""One example of a record file, by its place."""

from __future__ import annotations

from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.media_error import MediaError
from avcl_jax.data.tfrecord import RecordError
from data_prep.example_layout import ExamplePlace, TfdsLayout
from data_prep.sources import sequence_example, tfds_example
from data_prep.sources.footage import Footage


def open_example(
    path: str, example: ExamplePlace, start_seconds: float, end_seconds: float | None
) -> Footage:
    """Returns the clip that an example holds.

    Args:
      path: Record file.
      example: Which of its examples, and what to read of it.
      start_seconds: Where the wanted part starts, on the example's own timeline.
      end_seconds: Where it ends; None for all.

    Raises:
      MediaError: If the file cannot be read there, or the example is not as described.
    """
    try:
        payload = record_files.read(
            epath.Path(path), example.file_format, example.place, where=f"the example at {path}"
        )
    except RecordError as error:
        truncated = "truncated" in str(error)
        raise MediaError("truncated" if truncated else "damaged", str(error)) from error
    except FileNotFoundError as error:
        raise MediaError("not_found", f"{path} does not exist") from error
    except OSError as error:
        raise MediaError("unreadable", f"{type(error).__name__}: {error.strerror}") from error
    layout = example.layout
    if isinstance(layout, TfdsLayout):
        return tfds_example.footage(payload, layout, start_seconds, end_seconds)
    return sequence_example.footage(payload, layout, start_seconds, end_seconds)
