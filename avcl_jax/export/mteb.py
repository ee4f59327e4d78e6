"""Encoders as a model of mteb, the Massive Text Embedding Benchmark, for its video and audio tasks.

    import mteb
    from avcl_jax.export.mteb import MtebEncoder

    mteb.evaluate(MtebEncoder("small"), mteb.get_tasks(modalities=["video"]))

Media are decoded as everywhere in this package, so that frames keep their times, and mteb's own
decoders are not needed. mteb downloads the data of its tasks. `pip install "avcl-jax[mteb]"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import datasets
import numpy as np
from etils import epath
from mteb import similarity_functions
from mteb.models.model_meta import ModelMeta
from torch.utils.data import DataLoader

from avcl_jax.data.media import decode_media
from avcl_jax.data.preprocessing import AudioPreprocessing
from avcl_jax.errors import UserError
from avcl_jax.export.encoder import MODALITIES, Encoder
from avcl_jax.export.runs import open_encoders

_UNDECODED = {"video": datasets.Video(decode=False), "audio": datasets.Audio(decode=False)}


class MtebEncoder:
    """Exported encoders as mteb's `EncoderProtocol`.

    The embedding of a video or a recording is the mean of an encoder's features over its clips, of
    unit length. Where a task has both, the embeddings of video and audio are concatenated.
    """

    def __init__(self, encoders: epath.PathLike):
        """Takes encoders as `open_encoders` does: by name, or by the path of a run or an export."""
        source = open_encoders(encoders)
        self._encoders = source.encoders
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"avcl-jax/{PurePath(source.path).name}",
                "revision": source.fingerprint[:12],
                "modalities": list(source.encoders),
            }
        )

    def encode(self, inputs: DataLoader, *, task_metadata: Any, **_: Any) -> np.ndarray:
        """Returns float32 [items, channels].

        Args:
            inputs: rows of a `datasets.Dataset` with columns `video`, `audio` or both.
            task_metadata: description of the task, for messages.

        Raises:
            UserError: if the task has no input that the encoders take.
            MediaError: if an item cannot be decoded.
        """
        rows: Any = inputs.dataset
        columns = [m for m in MODALITIES if m in rows.column_names and m in self._encoders]
        if not columns:
            raise UserError(
                f"{task_metadata.name} has the inputs {', '.join(rows.column_names)}: the encoders "
                f"take {' and '.join(self._encoders)}"
            )
        for column in columns:
            rows = rows.cast_column(column, _UNDECODED[column])
        return np.stack(
            [np.concatenate([self._embed(row[m], m) for m in columns]) for row in rows]
        ).astype(np.float32)

    def _embed(self, item: Mapping[str, Any], modality: str) -> np.ndarray:
        encoder = self._encoders[modality]
        media = decode_media(
            item["bytes"] or item["path"], **_decoding(encoder), modalities=(modality,)
        )
        raw = (
            (media.frames, media.fps)
            if modality == "video"
            else (
                media.waveform,
                media.sample_rate_hz,
            )
        )
        mean = encoder(*raw).mean(axis=0)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each of the first with each of the second."""
        return similarity_functions.cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of each of the first with that of its place in the second."""
        return similarity_functions.pairwise_cos_sim(embeddings1, embeddings2)


def _decoding(encoder: Encoder) -> dict[str, Any]:
    spec = encoder.preprocess
    if isinstance(spec, AudioPreprocessing):
        return {"short_side": None, "max_fps": None, "sample_rate_hz": spec.log_mel.sample_rate_hz}
    return {"short_side": spec.image_size, "max_fps": None, "sample_rate_hz": 8000}
