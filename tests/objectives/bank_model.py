"""Reference implementation of the feature bank in numpy, row by row."""

from __future__ import annotations

import jax
import numpy as np

from avcl_jax.objectives.bank_rows import has_all
from avcl_jax.objectives.views import MODALITIES, Views

PLAYBACKS = 3


def unit(rng, *shape):
    """Random float32 unit vectors."""
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def random_batch(rng, videos, dim, sources, missing=0.2):
    """Views of a batch, as numpy arrays."""
    embeddings = {modality: unit(rng, videos, 2, dim) for modality in MODALITIES}
    source_id = rng.integers(0, sources, videos).astype(np.int32)
    label = rng.integers(-1, 3, (videos, 2)).astype(np.int32)
    playback = {
        modality: rng.integers(0, PLAYBACKS, (videos, 2)).astype(np.int32)
        for modality in MODALITIES
    }
    present = {modality: rng.random((videos, 2)) >= missing for modality in MODALITIES}
    number = np.arange(videos, dtype=np.int32)
    return Views(embeddings, present, playback, label, source_id, number)


def bank_rows(drawn):
    """Sampled rows as arguments of `contrastive_loss`."""
    return {
        "bank_positives": drawn.positives.embeddings,
        "bank_positive_mask": drawn.positives.mask,
        "bank_negatives": drawn.negatives.embeddings,
        "bank_negative_mask": drawn.negatives.mask,
    }


def as_set(bank):
    """The rows of a FeatureBank in order of insertion, wherever they lie."""
    numbers = bank.rows.numbers
    order = np.argsort(np.asarray(numbers.insertion))
    order = order[np.asarray(numbers.insertion)[order] >= 0]
    values = {name: getattr(numbers, name) for name in ("insertion", "source_id", "label")}
    for modality in MODALITIES:
        values[modality] = bank.rows.embeddings[modality]
        values[f"has_{modality}"] = has_all(bank.rows.presence, (modality,))
        values[f"{modality}_playback"] = numbers.playback(modality)
    return {name: np.asarray(column.astype(np.float32))[order] for name, column in values.items()}


def _threefry(key, x, y):
    """Threefry-2x32, 20 rounds (Salmon et al., "Parallel random numbers", SC 2011): first word."""
    x, y = (np.asarray(word, np.uint32) for word in (x, y))
    schedule = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    rotations = [(13, 15, 26, 6), (17, 29, 16, 24)]
    with np.errstate(over="ignore"):
        x, y = x + schedule[0], y + schedule[1]
        for block in range(5):
            for shift in rotations[block % 2]:
                x = x + y
                y = x ^ ((y << np.uint32(shift)) | (y >> np.uint32(32 - shift)))
            x = x + schedule[(block + 1) % 3]
            y = y + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x


def _bits(key, anchor, insertion):
    words = np.asarray(jax.random.key_data(key))
    return _threefry(words, np.full(len(insertion), anchor, np.uint32), insertion)


def _noise(key, anchor, insertion):
    return -np.log(-np.log(((_bits(key, anchor, insertion) >> 9) + 0.5) / 2**23))


class BankModel:
    """First in, first out; one dict per row."""

    def __init__(self, size):
        self.size = size
        self.rows = []
        self.inserted = 0

    def insert(self, batch):
        for i, view in np.ndindex(len(batch.source_id), 2):
            row = {"source_id": batch.source_id[i], "label": batch.label[i]}
            for modality in MODALITIES:
                row[f"has_{modality}"] = batch.present[modality][i, view]
                row[f"{modality}_playback"] = batch.playback[modality][i, view]
                present, values = row[f"has_{modality}"], batch.embeddings[modality][i, view]
                row[modality] = np.where(present, values, np.float32(0))
            self.rows.append(row | {"insertion": self.inserted})
            self.inserted += 1
        self.rows = self.rows[-self.size :]

    def as_set(self):
        names = self.rows[0] if self.rows else ()
        return {name: np.array([row[name] for row in self.rows], np.float32) for name in names}

    def _mean(self, modality, playback):
        rows = [
            row[modality]
            for row in self.rows
            if row[f"has_{modality}"] and row[f"{modality}_playback"] == playback
        ]
        return np.mean(rows, axis=0) if rows else 0.0

    def sample(self, key, number, batch, i, view, term, sampling):
        """(positives, negatives) of one anchor: insertion numbers, best first."""
        anchor, target = term
        other = {"video": "audio", "audio": "video"}
        pairs = {
            "same": [(anchor, anchor)],
            "cross": [(anchor, other[anchor])],
            "agreement": [("video", "video"), ("audio", "audio")],
        }[sampling.space]
        if not all(batch.present[own][i, view] for own in [anchor, *(own for own, _ in pairs)]):
            return [], []

        def score(row):
            similarities = []
            for own, modality in pairs:
                query, vector = batch.embeddings[own][i, view], row[modality]
                if sampling.ranking == "content":
                    if own == modality:
                        query = query - self._mean(own, batch.playback[own][i, view])
                        query = query / np.linalg.norm(query)
                    vector = vector - self._mean(modality, row[f"{modality}_playback"])
                    length = np.linalg.norm(vector)
                    vector = vector / length if length > 1e-3 else 0 * vector
                similarities.append(np.dot(query, vector))
            return min(similarities)

        def eligible(row):
            return row["source_id"] != batch.source_id[i] and all(
                row[f"has_{modality}"] for modality in [target, *(row for _, row in pairs)]
            )

        def draw(rows, kind, count, one_per_source):
            scores = np.array([score(row) for row in rows])
            insertion = np.array([row["insertion"] for row in rows], np.int32)
            anchor_id = 2 * batch.record_index[i] + view
            noise = _noise(jax.random.fold_in(key, number), anchor_id, insertion)
            if getattr(sampling, f"{kind}_sampling") == "gumbel":
                noise = scores / sampling.temperature + noise
            picked, sources = [], set()
            for r in np.argsort(-noise):
                source = rows[r]["source_id"]
                if len(picked) < count and not (one_per_source and source in sources):
                    picked.append(int(insertion[r]))
                    sources.add(source)
            return picked

        nearest = sorted(filter(eligible, self.rows), key=lambda row: -score(row))
        nearest = nearest[: sampling.positive_ranks]
        bits = _bits(key, 2**32 - 1, np.array([row["insertion"] for row in self.rows], np.int32))
        candidates = [self.rows[r] for r in np.argsort(-bits.astype(np.int64))]
        candidates = candidates[: sampling.negative_candidates]
        usable = sorted(filter(eligible, candidates), key=lambda row: -score(row))
        near = {row["source_id"] for row in nearest}
        left_out = int(sampling.negative_offset * len(usable))
        far = [row for row in usable[left_out:] if row["source_id"] not in near]
        enough = len(usable) / sampling.negative_candidates * self.size
        if enough < 4 * sampling.positive_ranks:
            positives = []
        else:
            positives = draw(nearest, "positive", sampling.num_positives, True)
        return positives, draw(far, "negative", sampling.num_negatives, False)
