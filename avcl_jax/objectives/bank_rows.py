"""Rows of a feature bank, and samples of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.objectives.views import MODALITIES, Modality, Views

_PRESENCE_BIT: Mapping[Modality, int] = {"video": 1, "audio": 2}
_PLAYBACK_COLUMN: Mapping[Modality, int] = {"video": 2, "audio": 3}
# Columns of `RowNumbers` before the labels.
FIXED_COLUMNS = 4


@flax.struct.dataclass
class RowNumbers:
    """Numbers of rows; one array, because devices exchange them together.

    Attributes:
        columns: int32 [..., 4 + labels], all −1 for an empty row.
    """

    columns: Any

    def __getitem__(self, rows: Any) -> RowNumbers:
        return RowNumbers(self.columns[rows])

    @property
    def insertion(self) -> Any:
        """Insertion number, which identifies a row wherever it is stored."""
        return self.columns[..., 0]

    @property
    def source_id(self) -> Any:
        """Source of the view."""
        return self.columns[..., 1]

    def playback(self, modality: Modality) -> Any:
        """Number of the speed and direction of the view's video or audio."""
        return self.columns[..., _PLAYBACK_COLUMN[modality]]

    @property
    def label(self) -> Any:
        """Labels [..., labels], for health metrics only; −1 unknown."""
        return self.columns[..., FIXED_COLUMNS:]


@flax.struct.dataclass
class BankRows:
    """Rows of a bank, each the embeddings of one view; arrays, or shapes or shardings of arrays."""

    embeddings: Any  # modality → [rows, dim], 0 where it is missing
    presence: Any  # uint8 [rows], see `presence_bits`
    numbers: Any  # `RowNumbers` of [rows]

    def usable(self, *modalities: Modality) -> Any:
        """Mask [rows] of the rows that are not empty and have all of `modalities`."""
        return (self.numbers.insertion >= 0) & has_all(self.presence, modalities)


def presence_bits(present: Mapping[Modality, Array]) -> Array:
    """Packs masks by modality into uint8, one bit each."""
    return present["video"].astype(jnp.uint8) | (present["audio"].astype(jnp.uint8) << 1)


def has_all(presence: Any, modalities: tuple[Modality, ...]) -> Any:
    """Mask of where `presence_bits` contain all of `modalities`."""
    wanted = sum(_PRESENCE_BIT[modality] for modality in modalities)
    return (presence & wanted) == wanted


def rows_of(views: Views, insertion: Array) -> BankRows:
    """Rows of all views, both of the first video first, with insertion numbers int [rows]."""

    def embeddings(modality: Modality) -> Array:
        # The encoder's output for a missing modality may be NaN.
        values, mask = views.embeddings[modality], views.present[modality]
        values = jnp.where(mask[..., None], values, jnp.zeros((), values.dtype))
        return values.reshape(-1, values.shape[-1])

    playback = [views.playback[name].ravel() for name in MODALITIES]
    columns = jnp.stack([insertion, jnp.repeat(views.source_id, 2), *playback], axis=1)
    return BankRows(
        embeddings={name: embeddings(name) for name in MODALITIES},
        presence=presence_bits(views.present).ravel(),
        numbers=RowNumbers(jnp.concatenate([columns, jnp.repeat(views.label, 2, axis=0)], axis=1)),
    )


def views_of(rows: BankRows, record_index: Array) -> Views:
    """Undoes `rows_of` for rows whose arrays are [videos, 2, ...]."""
    numbers = rows.numbers
    return Views(
        embeddings=rows.embeddings,
        present={name: has_all(rows.presence, (name,)) for name in MODALITIES},
        playback={name: numbers.playback(name) for name in MODALITIES},
        label=numbers.label[:, 0],
        source_id=numbers.source_id[:, 0],
        record_index=record_index,
    )


class DrawnRows(NamedTuple):
    """Rows sampled for each anchor; without the mask, a row is 0 and its numbers are −1."""

    embeddings: Float[Array, "videos 2 rows dim"]  # of the target modality
    mask: Bool[Array, "videos 2 rows"]
    numbers: RowNumbers  # [videos, 2, rows]

    def where(self, mask: Any) -> DrawnRows:
        """Keeps the rows for which `mask` is set, too."""
        mask = self.mask & mask
        zero = jnp.zeros((), self.embeddings.dtype)
        return DrawnRows(
            embeddings=jnp.where(mask[..., None], self.embeddings, zero),
            mask=mask,
            numbers=RowNumbers(jnp.where(mask[..., None], self.numbers.columns, -1)),
        )


class BankSample(NamedTuple):
    """Positives and negatives of each anchor."""

    positives: DrawnRows
    negatives: DrawnRows
