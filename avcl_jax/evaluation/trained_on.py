"""Records that an encoder met in pretraining are no test of it, not even without their labels."""

from __future__ import annotations

import numpy as np

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.protocol import ProtocolError


def count_trained_on(trained_on: str, records: RecordDataset, positions: np.ndarray) -> int:
    """Returns the number of records that were pretrained on.

    Args:
        trained_on: fingerprint of the records of the pretraining, with their selection.
        records: data set of the test.
        positions: int [n] of the test records in it.
    """
    if not trained_on.startswith(records.fingerprint):
        return 0
    met = Selection.parse(trained_on.removeprefix(records.fingerprint)).positions(records)
    return len(np.intersect1d(met, positions))


def check_not_trained_on(
    source: EncoderSource, records: RecordDataset, positions: np.ndarray, *, allow: bool, what: str
) -> None:
    """Refuses an encoder that was pretrained on records that it is tested on.

    Only what a run says of its own data can be checked: one on another data set, or on a copy that
    was prepared otherwise, or imported weights, pass.

    Args:
        source: the encoder.
        records: data set of the test.
        positions: int [n] of the test records in it.
        allow: say it, and go on.
        what: name of these records in the message.

    Raises:
        ProtocolError: with their number.
    """
    both = count_trained_on(source.trained_on or "", records, positions)
    if not both:
        return
    said = f"{source.path} was pretrained, without labels, on {both} of the {len(positions)} {what}"
    if not allow:
        raise ProtocolError(
            f"{said}: pretrain without them (data.select), or set data.allow_trained_on=True"
        )
    print(f"{said}: its figure is not that of an encoder that never met them", flush=True)
