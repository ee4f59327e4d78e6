"""Transformer encoders for clips and for spectrograms.

Video: Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021; tubelets, learned positions,
attention over all tokens (its model 1) or factorised into space and time (model 3, and, time before
space, the divided attention of Bertasius et al., TimeSformer, ICML 2021). Audio: Gong et al., "AST:
Audio Spectrogram Transformer", Interspeech 2021, with patches that do not overlap, as in Huang et
al., "Masked Autoencoders that Listen", NeurIPS 2022.

Both average their tokens instead of reading a class token, so pooled and unpooled features are
related as those of the convolutional encoders are. No normalisation looks across rows: a missing
row needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import EncoderModule, VideoEncoder, encoded, patches

Attention = Literal["joint", "factorised"]

_POSITIONS = nn.initializers.normal(0.02)
_EPSILON = 1e-6  # of layer normalisation, as in ViT's published code


def _attention(
    query: Float[Array, "*batch tokens heads depth"],
    key: Float[Array, "*batch tokens heads depth"],
    value: Float[Array, "*batch tokens heads depth"],
) -> Float[Array, "*batch tokens heads depth"]:
    """Attention with a float32 softmax, whose weights are kept and multiplied in the inputs' dtype.

    Flax's own keeps them, and multiplies by them, in float32 if the softmax is float32.
    """
    one_axis = [array.reshape(-1, *array.shape[-3:]) for array in (query, key, value)]
    return jax.nn.dot_product_attention(*one_axis).reshape(query.shape)


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention over the last axis but one, with its residual.

    Attributes:
        heads: number of heads.
        dtype: compute dtype; the softmax is float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch tokens channels"]
    ) -> Float[Array, "*batch tokens channels"]:
        """Mixes tokens."""
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            attention_fn=_attention,
            deterministic=True,
            name="attention",
        )(y)
        return x + y


class FeedForward(nn.Module):
    """Pre-normalised two-layer perceptron of four times the width, with its residual.

    Attributes:
        dtype: compute dtype.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Maps every token on its own."""
        channels = x.shape[-1]
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        y = nn.gelu(nn.Dense(4 * channels, dtype=self.dtype, name="hidden")(y), approximate=False)
        return x + nn.Dense(channels, dtype=self.dtype, name="output")(y)


def _positions(module: nn.Module, grid: tuple[int, ...]) -> Array:
    """Learned positions of a module, interpolated linearly if they are of another grid.

    Args:
        module: owner of the parameter.
        grid: (cells along each axis, channels).

    Returns:
        float32 [1, *grid].
    """
    learned = (1, *grid)
    if module.has_variable("params", "positions"):
        learned = module.get_variable("params", "positions").shape
    positions = module.param("positions", _POSITIONS, learned, jnp.float32)
    # Without antialiasing, as PyTorch's `interpolate`, with which AST and VideoMAE do so.
    return jax.image.resize(positions, (1, *grid), "linear", antialias=False)


class Transformer(EncoderModule):
    """Transformer over patches of an array, each a token.

    ViT-S has width 384, depth 12, 6 heads; ViT-B width 768, depth 12, 12 heads. Positions are
    learned for the inputs that the encoder is initialised with, and interpolated for others.

    Attributes:
        width: channels of a token.
        depth: number of layers.
        heads: heads of each attention.
    """

    width: int
    depth: int
    heads: int

    def _tokens(self, x: Array, sizes: Sequence[int], **named: Any) -> Array:
        """Tokens [batch, *cells, width] of patches of `sizes`, with their positions."""
        x = patches(x, sizes, **named)
        x = nn.Dense(self.width, dtype=self.dtype, name="embedding")(x)
        return x + _positions(self, x.shape[1:]).astype(self.dtype)

    def _attend(self, x: Array, name: str) -> Array:
        return self.run(SelfAttention(self.heads, self.dtype, name=name), x)

    def _feed_forward(self, x: Array, name: str) -> Array:
        return self.run(FeedForward(self.dtype, name=name), x)

    def _normalise(self, x: Array) -> Array:
        return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)


class VideoTransformer(Transformer, VideoEncoder):
    """Transformer over tubelets of a clip.

    Attributes:
        tubelet: (time, height, width) of the pixels of a token.
        attention: "joint" over all tokens, or "factorised": first over the tokens of one moment,
            then over the moments of one place, in every layer.
    """

    tubelet: tuple[int, int, int]
    attention: Attention

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch time height width 3"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes clips, see `encoders.EncoderContract`; the map is the normalised tokens.

        Raises:
            UserError: if the tubelet does not divide the clip, or `attention` is unknown.
        """
        if self.attention not in ("joint", "factorised"):
            raise UserError(f"unknown attention {self.attention!r}: use 'joint' or 'factorised'")
        x = self._tokens(
            self.prepare(video, subtract_time_mean=self.subtract_time_mean),
            self.tubelet,
            names=("tubelet", "clip"),
            settings=("num_frames", "image_size", "image_size"),
        )
        batch, moments, rows, columns, width = shape = x.shape
        x = x.reshape(batch, moments, rows * columns, width)
        if self.attention == "joint":
            x = x.reshape(batch, 1, -1, width)
        for layer in range(1, self.depth + 1):
            if self.attention == "factorised":
                x = self._attend(x, f"layer{layer}_space").swapaxes(1, 2)
                x = self._attend(x, f"layer{layer}_time").swapaxes(1, 2)
            else:
                x = self._attend(x, f"layer{layer}_attention")
            x = self._feed_forward(x, f"layer{layer}_mlp")
        return encoded(self._normalise(x).reshape(shape))


class AudioTransformer(Transformer):
    """Transformer over patches of a spectrogram.

    Attributes:
        patch: (frames, mels) of a token.
    """

    patch: tuple[int, int]

    @nn.compact
    def __call__(
        self,
        spectrogram: Float[Array, "batch frames mels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes spectrograms, see `encoders.EncoderContract`; the map is the normalised tokens.

        Raises:
            UserError: if the patch does not divide the spectrogram.
        """
        x = self._tokens(
            spectrogram[..., None].astype(self.dtype),
            self.patch,
            names=("patch", "spectrogram"),
            settings=("spectrogram.frames", "spectrogram.mels"),
        )
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        for layer in range(1, self.depth + 1):
            x = self._attend(x, f"layer{layer}_attention")
            x = self._feed_forward(x, f"layer{layer}_mlp")
        return encoded(self._normalise(x).reshape(shape))
