"""The records that a run trains on, checked before anything slow."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import ml_collections

from avcl_jax import experiment
from avcl_jax.data.pipeline import check_enough
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.objectives.bank_health import PLAYBACK_KINDS

LEAST_VIDEOS = 2  # in a batch, as one has no negatives


def open_records(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> UsableRecords:
    """Opens the records that a config trains on, and checks that it can train on them.

    Args:
        config: config of `configs/pretrain.py`.
        mesh: mesh of `build`.

    Raises:
        RecordError: if the data set or the split does not exist.
        UserError: if the config does not fit the records.
    """
    records = RecordDataset(config.data.directory, config.data.split)
    selection = Selection.parse(config.data.select)
    source = UsableRecords(records, experiment.render_spec(config), selection)
    _check_health_labels(config.bank.health_labels, records)
    _check_modalities(config.modalities, source, config.data.directory)
    check_enough(
        source,
        config.global_batch_size,
        multiple=mesh.size * config.micro_batches,
        least=LEAST_VIDEOS,
        bank_size=config.bank.size,
    )
    return source


def _check_modalities(modalities: str, source: UsableRecords, directory: str) -> None:
    """Refuses to train two modalities where all records lack one: nothing would be contrasted."""
    if modalities != "audio_visual":
        return
    for name, other in (("audio", "video"), ("video", "audio")):
        if len(source.lacking([name])) == source.num_selected:
            raise UserError(
                f"modalities='audio_visual', and none of the {source.num_selected} records of "
                f"{directory} has {name} on which a view fits: set --config.modalities={other} to "
                f"train on {other} alone"
            )


def _check_health_labels(labels: Sequence[str], records: RecordDataset) -> None:
    known = sorted(records.labels)
    for label in labels:
        if label in PLAYBACK_KINDS:
            raise UserError(
                f"bank.health_labels {label!r} would share its metrics with the {label} of "
                "playback: leave it out, or prepare the records with another name for the label"
            )
        if label not in known:
            raise UserError(
                f"bank.health_labels {label!r} is not a label with one class per clip in "
                f"{records}, which has {', '.join(known) or 'none'}: name some of these, or set "
                "bank.health_labels='()' for none"
            )
