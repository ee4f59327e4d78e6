"""The model that is trained: two encoders, two projections, a head per temporal task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.models.heads import ProjectionHead, TemporalHead
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.objectives.views import Modality, per_view


def module_rows(present: Mapping[Modality, Array]) -> dict[str, Array]:
    """Rows that enter the statistics of each module of `AudioVisualModel`, by its name.

    Args:
        present: modality → bool [videos, 2], the view exists.

    Returns:
        bool [videos, 2], or [videos] for the heads of pairs within a modality.
    """
    heads = {f"{name}_head": task.present(present) for name, task in TASKS.items()}
    return heads | {
        f"{modality}_{part}": mask
        for modality, mask in present.items()
        for part in ("encoder", "projection")
    }


class AudioVisualModel(nn.Module):
    """Video encoder, audio encoder and all heads of the method.

    Attributes:
        video_encoder: module mapping clips to a dict with `features`, or None for audio only.
        audio_encoder: module mapping spectrograms to a dict with `features`, or None for video
            only.
        embedding_dim: dimension of the embeddings.
        projection_hidden: hidden width of the projection heads.
        temporal_hidden: hidden width of the temporal heads.
        speeds: playback speeds.
        dtype: compute dtype of the heads.
    """

    video_encoder: nn.Module | None
    audio_encoder: nn.Module | None
    embedding_dim: int
    projection_hidden: int
    temporal_hidden: int
    speeds: Sequence[int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "videos views time height width 3"] | None,
        spectrogram: Float[Array, "videos views frames mels"] | None,
        has_video: Bool[Array, "videos *of_video"],
        has_audio: Bool[Array, "videos *of_audio"],
        *,
        train: bool,
    ) -> dict[str, Array]:
        """Encodes two views of each video and classifies their playback.

        Args:
            video: clips of both views; not looked at without a video encoder.
            spectrogram: log-mel spectrograms of both views; not looked at without audio encoder.
            has_video: bool [videos], or [videos, 2] of each view; False without video.
            has_audio: the same for audio.
            train: normalise by the statistics of the batch and update the running ones.

        Returns:
            float32 arrays `video_features`, `audio_features` [videos, 2, channels],
            `video_embeddings`, `audio_embeddings` [videos, 2, embedding_dim] of unit norm, and
            logits of every task of `objectives.temporal.TASKS` by its name, [videos, 2, classes],
            or [videos, classes] within a modality. Entries of an absent encoder are absent.
        """
        encoders: dict[Modality, tuple[nn.Module | None, Any, Array]] = {
            "video": (self.video_encoder, video, per_view(has_video)),
            "audio": (self.audio_encoder, spectrogram, per_view(has_audio)),
        }
        outputs: dict[str, Array] = {}
        features: dict[Modality, Array] = {}
        present: dict[Modality, Array] = {}
        for modality, (encoder, views, mask) in encoders.items():
            if encoder is None or views is None:
                continue
            # [videos, 2, ...] is reshaped, never concatenated across shards.
            rows, flat = mask.reshape(-1), views.reshape(-1, *views.shape[2:])
            encoded = encoder(flat, train=train, mask=rows)["features"]
            projection = ProjectionHead(
                self.projection_hidden,
                self.embedding_dim,
                self.dtype,
                name=f"{modality}_projection",
            )
            embeddings = projection(encoded, train=train, mask=rows)
            features[modality] = encoded.reshape(*views.shape[:2], -1)
            present[modality] = mask
            outputs[f"{modality}_features"] = features[modality]
            outputs[f"{modality}_embeddings"] = embeddings.reshape(*views.shape[:2], -1)
        for name, task in TASKS.items():
            if not features.keys() >= set(task.reads):
                continue
            head = TemporalHead(
                self.temporal_hidden,
                len(task.classes(self.speeds)),
                self.dtype,
                name=f"{name}_head",
            )
            mask = task.present(present)
            inputs = [x.reshape(-1, x.shape[-1]) for x in task.inputs(features)]
            logits = head(*inputs, train=train, mask=mask.reshape(-1))
            outputs[name] = logits.reshape(*mask.shape, -1)
        return outputs
