"""Settings of a feature bank's positives and negatives, and their draws.

Positives are drawn without replacement from the rows that are most similar to the anchor, at most
one per source. Negatives are drawn from candidates: rows chosen at random once per step, for all
anchors. Each anchor leaves out the nearest candidates and every source among its first ranks, as
rows next to the positives are the likeliest to show the same content. Functions work on arrays of
one device.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.errors import UserError
from avcl_jax.objectives.bank_rows import RowNumbers
from avcl_jax.objectives.views import Modality, Term

# The nearest of few rows need not be similar: an anchor has positives only if at least this many
# times `positive_ranks` rows are eligible, as estimated from the candidates.
ELIGIBLE_PER_POSITIVE_RANK = 4
# Keys the choice of candidates in place of an anchor's number; no anchor has it.
_NO_ANCHOR = 2**32 - 1
_NAMES = {
    "space": ("same", "cross", "agreement"),
    "ranking": ("raw", "content"),
    "positive_sampling": ("gumbel", "uniform"),
    "negative_sampling": ("gumbel", "uniform"),
}


@dataclass(frozen=True)
class BankSampling:
    """Settings of ranking and sampling; `UserError` on an unknown name or a number out of range."""

    # Similarity that ranks the rows. "same": of anchor and row in the anchor's modality; "cross":
    # of the anchor and the row's other modality; "agreement": the minimum of the video-video and
    # the audio-audio similarity.
    space: str
    # "raw": by the cosine of embeddings; "content": by the cosine of their differences from the
    # mean of their playback in the bank.
    ranking: str
    playbacks: int  # number of playbacks; those of rows are in [0, playbacks)
    num_positives: int  # per anchor, at most one per source
    num_negatives: int  # per anchor
    positive_ranks: int  # number of most similar rows, from which positives are drawn
    negative_candidates: int  # per step
    negative_offset: float  # fraction of eligible candidates, the most similar, that is left out
    # "gumbel": Gumbel top-k of similarity / temperature; "uniform": equal probabilities.
    positive_sampling: str
    negative_sampling: str
    temperature: float  # of Gumbel sampling, in units of similarity

    def __post_init__(self) -> None:
        for name, known in _NAMES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} is {value!r}; use one of {', '.join(known)}.")
        if not 0 <= self.negative_offset < 1:
            raise UserError(f"negative_offset is {self.negative_offset}; need 0 <= it < 1.")
        for kind, number, rows, of in (
            ("positives", self.num_positives, "positive_ranks", self.positive_ranks),
            ("negatives", self.num_negatives, "negative_candidates", self.negative_candidates),
        ):
            if not 0 <= number <= of:
                raise UserError(
                    f"num_{kind} = {number} cannot be drawn from {rows} = {of} rows; "
                    f"need 0 <= num_{kind} <= {rows}."
                )
        if self.negative_candidates < 1:
            raise UserError(
                "negative_candidates is 0; use at least 1, from which the number of eligible "
                "rows is estimated."
            )
        if "gumbel" in (self.positive_sampling, self.negative_sampling) and self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; Gumbel sampling needs > 0.")

    def pairs(self, anchor: Modality) -> tuple[Term, ...]:
        """(modality of the anchor, modality of the row) pairs whose similarities rank the rows."""
        if self.space == "agreement":
            return (("video", "video"), ("audio", "audio"))
        other: Modality = "audio" if anchor == "video" else "video"
        return ((anchor, anchor if self.space == "same" else other),)

    def row_modalities(self, term: Term) -> tuple[Modality, ...]:
        """Modalities of the bank that ranking and returned rows read, each once."""
        anchor, target = term
        return tuple(dict.fromkeys([*(row for _, row in self.pairs(anchor)), target]))

    def anchor_modalities(self, anchor: Modality) -> tuple[Modality, ...]:
        """Modalities that an anchor must have, each once."""
        return tuple(dict.fromkeys([anchor, *(own for own, _ in self.pairs(anchor))]))


def _random_bits(key: Array, anchor: Array, insertion: Array) -> Array:
    """Random 32 bits [anchors, rows] that depend on (key, anchor, insertion number) alone."""
    # One Threefry block per pair, counting (anchor, insertion). `jax.random` under vmap needs three
    # (two fold_in, one draw), and draws of an "rbg" key would depend on the batch's shape.
    counter = jnp.stack([jnp.broadcast_to(anchor[:, None], insertion.shape), insertion])
    words = jax.random.key_data(key).ravel()[:2]
    return jax.extend.random.threefry_2x32(words, counter.astype(jnp.uint32))[0]


def _gumbel(key: Array, anchor: Array, insertion: Array) -> Array:
    """Gumbel noise [anchors, rows]."""
    # 23 bits, centred: float32 holds every value exactly, and neither 0 nor 1 is among them.
    bits = _random_bits(key, anchor, insertion)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def choose_candidates(insertion: Array, key: Array, sampling: BankSampling) -> Array:
    """Chooses candidates, written rows first: int [candidates] positions of rows.

    The choice depends on the step's key and the insertion numbers [rows] alone, not on positions.
    """
    bits = _random_bits(key, jnp.full(1, _NO_ANCHOR, jnp.uint32), insertion[None])[0]
    order = jnp.where(insertion >= 0, (bits >> 1).astype(jnp.int32), -1)
    return jax.lax.top_k(order, sampling.negative_candidates)[1]


def pick_positives(
    scores: Array,
    rows: RowNumbers,
    enough: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Draws positives: positions [anchors, num_positives] among the first ranks, and validity.

    Args:
        scores: [anchors, ranks] similarities, −inf where there is no row.
        rows: Numbers of the rows [anchors, ranks].
        enough: bool [anchors] from `enough_eligible`; other anchors get no positives.
        key: Key of the step and term.
        anchor: int [anchors] number of each anchor.
    """
    perturbed = _gumbel(key, anchor, rows.insertion)
    if sampling.positive_sampling == "gumbel":
        perturbed = scores / sampling.temperature + perturbed
    perturbed = jnp.where((scores > -jnp.inf) & enough[:, None], perturbed, -jnp.inf)
    # One per source, without replacement: the best, then the best of all other sources, …
    values, positions = [], []
    for _ in range(sampling.num_positives):
        best = jnp.argmax(perturbed, axis=1, keepdims=True)
        values.append(jnp.take_along_axis(perturbed, best, axis=1))
        positions.append(best)
        same = rows.source_id == jnp.take_along_axis(rows.source_id, best, axis=1)
        perturbed = jnp.where(same, -jnp.inf, perturbed)
    if not values:
        return jnp.zeros((len(scores), 0), jnp.int32), jnp.zeros((len(scores), 0), bool)
    return jnp.concatenate(positions, axis=1), jnp.concatenate(values, axis=1) > -jnp.inf


def pick_negatives(
    scores: Array,
    rows: RowNumbers,
    near_source: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Draws negatives: positions [anchors, num_negatives] among the candidates, and validity.

    Args:
        scores: [anchors, candidates] similarities, −inf where not eligible.
        rows: Numbers of the candidates.
        near_source: int [anchors, ranks] sources of the first ranks, −1 where there is no row.
        key: Key of the step and term.
        anchor: int [anchors] number of each anchor.
    """
    eligible = scores > -jnp.inf
    left_out = jnp.floor(sampling.negative_offset * eligible.sum(-1, keepdims=True))
    descending = -jnp.sort(-scores, axis=-1)
    threshold = jnp.take_along_axis(descending, left_out.astype(jnp.int32), axis=1)
    perturbed = _gumbel(key, anchor, jnp.broadcast_to(rows.insertion, scores.shape))
    if sampling.negative_sampling == "gumbel":
        perturbed = scores / sampling.temperature + perturbed
    # Rank by rank: for a bank of a million rows, comparing with all ranks at once takes 256 MiB.
    # `scores > inf` is False everywhere and varies over devices as the result does.
    near, _ = jax.lax.scan(
        lambda near, source: (near | (rows.source_id[None] == source[:, None]), None),
        scores > jnp.inf,
        near_source.T,
    )
    perturbed = jnp.where(eligible & (scores <= threshold) & ~near, perturbed, -jnp.inf)
    value, position = jax.lax.top_k(perturbed, sampling.num_negatives)
    return position, value > -jnp.inf


def enough_eligible(scores: Array, rows: int, sampling: BankSampling) -> Array:
    """Tests whether enough of a bank's rows are eligible for positives: bool [anchors].

    The estimate is the fraction of the candidates' similarities [anchors, candidates] that are
    not −inf.
    """
    eligible = (scores > -jnp.inf).mean(-1) * rows
    return eligible >= ELIGIBLE_PER_POSITIVE_RANK * sampling.positive_ranks
