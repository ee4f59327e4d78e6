"""The feature bank in numpy, row by row: what `feature_bank` must hold and may return."""

from __future__ import annotations

import jax
import numpy as np


def unit(rng, *shape):
    """Random float32 unit vectors."""
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def random_batch(rng, videos, dim, sources, missing=0.2):
    """Arguments of `insert`, as numpy arrays."""
    return {
        "video": unit(rng, videos, 2, dim),
        "audio": unit(rng, videos, 2, dim),
        "source_id": rng.integers(0, sources, videos).astype(np.int32),
        "label": rng.integers(-1, 3, videos).astype(np.int32),
        "has_video": rng.random((videos, 2)) >= missing,
        "has_audio": rng.random((videos, 2)) >= missing,
    }


def as_anchors(batch, anchor_id):
    """The same batch as arguments of `sample`."""
    anchors = {name: batch[name] for name in ("source_id", "has_video", "has_audio")}
    return anchors | {
        "anchors_video": batch["video"],
        "anchors_audio": batch["audio"],
        "anchor_id": np.asarray(anchor_id, np.int32),
    }


def as_set(bank):
    """The rows of a FeatureBank in order of insertion, wherever they lie."""
    order = np.argsort(np.asarray(bank.insertion))
    order = order[np.asarray(bank.insertion)[order] >= 0]
    names = ("insertion", "source_id", "label", "has_video", "has_audio", "video", "audio")
    return {name: np.asarray(getattr(bank, name).astype(np.float32))[order] for name in names}


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


def _noise(key, anchor, insertion):
    words = np.asarray(jax.random.key_data(key))
    bits = _threefry(words, np.full_like(insertion, anchor), insertion)
    return -np.log(-np.log(((bits >> 9) + 0.5) / 2**23))


class BankModel:
    """First in, first out; one dict per row."""

    def __init__(self, size):
        self.size = size
        self.rows = []
        self.inserted = 0

    def insert(self, batch):
        for i in range(len(batch["source_id"])):
            for view in range(2):
                row = {name: values[i] for name, values in batch.items()}
                for modality in ("video", "audio"):
                    row[f"has_{modality}"] = row[f"has_{modality}"][view]
                    row[modality] = row[modality][view] * row[f"has_{modality}"]
                self.rows.append(row | {"insertion": self.inserted})
                self.inserted += 1
        self.rows = self.rows[-self.size :]

    def as_set(self):
        names = ("insertion", "source_id", "label", "has_video", "has_audio", "video", "audio")
        return {name: np.array([row[name] for row in self.rows], np.float32) for name in names}

    def sample(self, key, batch, anchor_id, i, view, term, sampling):
        """(positives, negatives) of one anchor: insertion numbers, best first."""
        anchor, target = term
        other = {"video": "audio", "audio": "video"}
        pairs = {
            "same": [(anchor, anchor)],
            "cross": [(anchor, other[anchor])],
            "agreement": [("video", "video"), ("audio", "audio")],
        }[sampling.space]
        if not all(batch[f"has_{own}"][i, view] for own in [anchor, *(own for own, _ in pairs)]):
            return [], []
        eligible = [
            row
            for row in self.rows
            if row["source_id"] != batch["source_id"][i]
            and all(row[f"has_{modality}"] for modality in [target, *(row for _, row in pairs)])
        ]
        scores = np.array(
            [
                min(np.dot(batch[own][i, view], row[modality]) for own, modality in pairs)
                for row in eligible
            ]
        )
        order = np.argsort(-scores)[: sampling.ranks]
        insertion = np.array([eligible[r]["insertion"] for r in order], np.int32)
        noise = _noise(key, 2 * anchor_id + view, insertion)
        perturbed = noise
        if sampling.sampling == "gumbel":
            perturbed = scores[order] / sampling.temperature + noise

        def draw(ranks, count, one_per_source):
            picked, sources = [], set()
            for r in sorted(ranks, key=lambda r: -perturbed[r]):
                source = eligible[order[r]]["source_id"]
                if len(picked) < count and not (one_per_source and source in sources):
                    picked.append(int(insertion[r]))
                    sources.add(source)
            return picked

        ranks = range(len(order))
        return (
            draw(ranks[: sampling.positive_ranks], sampling.num_positives, True),
            draw(ranks[sampling.positive_ranks :], sampling.num_negatives, False),
        )
