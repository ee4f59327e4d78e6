"""The model that is trained: two encoders, two projections, seven temporal heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.models.heads import PairwiseHead, ProjectionHead, UnitaryHead
from avcl_jax.objectives.views import per_view

NUM_DIRECTIONS = 2
NUM_ORDERS = 3


class AudioVisualModel(nn.Module):
    """Video encoder, audio encoder and all heads of the method.

    Attributes:
        video_encoder: module mapping clips to a dict with `features`, or None for audio only.
        audio_encoder: module mapping spectrograms to a dict with `features`, or None for video
            only.
        embedding_dim: dimension of the embeddings.
        projection_hidden: hidden width of the projection heads.
        temporal_hidden: hidden width of the temporal heads.
        num_speeds: number of playback speeds.
        dtype: compute dtype of the heads.
    """

    video_encoder: nn.Module | None
    audio_encoder: nn.Module | None
    embedding_dim: int
    projection_hidden: int
    temporal_hidden: int
    num_speeds: int
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
            `video_embeddings`, `audio_embeddings` [videos, 2, embedding_dim] of unit norm; logits
            `speed_video`, `speed_audio` [videos, 2, speeds], `direction_video`, `direction_audio`
            [videos, 2, 2], `order_vv`, `order_aa` [videos, 3], and `order_va` [videos, 2, 3]
            for (v1, a2) and (v2, a1). Entries of an absent encoder are absent.
        """
        outputs: dict[str, Array] = {}
        has_video, has_audio = per_view(has_video), per_view(has_audio)
        if self.video_encoder is not None and video is not None:
            outputs |= self._modality("video", self.video_encoder, video, has_video, train)
        if self.audio_encoder is not None and spectrogram is not None:
            outputs |= self._modality("audio", self.audio_encoder, spectrogram, has_audio, train)
        v, a = outputs.get("video_features"), outputs.get("audio_features")
        if v is not None:
            head = self._pairwise("order_vv_head")
            outputs["order_vv"] = head(v[:, 0], v[:, 1], train=train, mask=has_video.all(axis=1))
        if a is not None:
            head = self._pairwise("order_aa_head")
            outputs["order_aa"] = head(a[:, 0], a[:, 1], train=train, mask=has_audio.all(axis=1))
        if v is not None and a is not None:
            head = self._pairwise("order_va_head")
            # (v1, a2) and (v2, a1): the two intervals of one view coincide and carry no order.
            first = v.reshape(-1, v.shape[-1])
            second = a[:, ::-1].reshape(-1, a.shape[-1])
            mask = (has_video & has_audio[:, ::-1]).reshape(-1)
            logits = head(first, second, train=train, mask=mask)
            outputs["order_va"] = logits.reshape(*v.shape[:2], NUM_ORDERS)
        return outputs

    def _pairwise(self, name: str) -> PairwiseHead:
        return PairwiseHead(self.temporal_hidden, NUM_ORDERS, self.dtype, name=name)

    def _modality(
        self, name: str, encoder: nn.Module, views: Array, present: Array, train: bool
    ) -> dict[str, Array]:
        # [videos, 2, ...] is reshaped, never concatenated across shards.
        mask = present.reshape(-1)
        clips = views.reshape(-1, *views.shape[2:])
        features = encoder(clips, train=train, mask=mask)["features"]
        embeddings = ProjectionHead(
            self.projection_hidden, self.embedding_dim, self.dtype, name=f"{name}_projection"
        )(features, train=train, mask=mask)
        speed = UnitaryHead(
            self.temporal_hidden, self.num_speeds, self.dtype, name=f"speed_{name}_head"
        )(features, train=train, mask=mask)
        direction = UnitaryHead(
            self.temporal_hidden, NUM_DIRECTIONS, self.dtype, name=f"direction_{name}_head"
        )(features, train=train, mask=mask)
        outputs = {
            f"{name}_features": features,
            f"{name}_embeddings": embeddings,
            f"speed_{name}": speed,
            f"direction_{name}": direction,
        }
        return {key: value.reshape(*views.shape[:2], -1) for key, value in outputs.items()}
