"""Convolution and normalisation shared by the video and the audio encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Lowering = Literal["auto", "direct", "folded"]

_INITIALIZER = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Conv3D(nn.Module):
    """A 3-D convolution without bias whose kernel may be lowered as a 2-D one.

    A kernel of shape (1, h, w) or (t, 1, 1) is the same function as a 2-D convolution over frames
    or over flattened pixels. On a TPU the plain 3-D form is the faster one; on a CPU the 2-D form
    is (design section 4), because XLA's CPU backend has no fast 3-D kernel. `auto` picks by the
    default backend when the function is traced; the parameters are the same for all forms.

    Attributes:
        features: output channels.
        kernel_size: (time, height, width).
        strides: (time, height, width).
        lowering: "auto", "direct" (3-D) or "folded" (2-D where the kernel allows it).
        dtype: compute dtype; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    lowering: Lowering = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time height width channels"]
    ) -> Float[Array, "batch time2 height2 width2 features"]:
        """Convolves with symmetric padding of (kernel - 1) // 2, as PyTorch's encoders do."""
        kernel = self.param(
            "kernel", _INITIALIZER, (*self.kernel_size, x.shape[-1], self.features), jnp.float32
        ).astype(self.dtype)
        x = x.astype(self.dtype)
        folded = self.lowering == "folded" or (
            self.lowering == "auto" and jax.default_backend() == "cpu"
        )
        time, height, width = self.kernel_size
        if folded and time == 1 and self.strides[0] == 1:
            batch, frames = x.shape[:2]
            y = _convolve(x.reshape(-1, *x.shape[2:]), kernel[0], self.strides[1:])
            return y.reshape(batch, frames, *y.shape[1:])
        if folded and height == width == 1:
            x = x[:, :, :: self.strides[1], :: self.strides[2]]
            batch, frames, rows, columns, channels = x.shape
            y = _convolve(
                x.reshape(batch, frames, rows * columns, channels),
                kernel[:, 0],
                (self.strides[0], 1),
            )
            return y.reshape(batch, -1, rows, columns, self.features)
        return _convolve(x, kernel, self.strides)


class Conv2D(nn.Module):
    """A 2-D convolution without bias, padded by (kernel - 1) // 2 on both sides.

    Attributes:
        features: output channels.
        kernel_size: (frames, mels).
        strides: (frames, mels).
        dtype: compute dtype; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch frames mels channels"]
    ) -> Float[Array, "batch frames2 mels2 features"]:
        """Convolves `x`."""
        kernel = self.param(
            "kernel", _INITIALIZER, (*self.kernel_size, x.shape[-1], self.features), jnp.float32
        ).astype(self.dtype)
        return _convolve(x.astype(self.dtype), kernel, self.strides)


def _convolve(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """Channels-last convolution of any rank with PyTorch's symmetric padding."""
    spatial = "DHW"[-(x.ndim - 2) :]
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:-2]]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )


class BatchNorm(nn.Module):
    """Batch normalisation over present rows only, statistics over the global batch in float32.

    Under `jit` with a sharded batch the mean is taken over all devices by construction, that is,
    this is synchronised batch normalisation. A row whose modality is missing enters neither the
    statistics of the batch nor the running ones (design section 2.4).

    Attributes:
        momentum: weight of the old running statistics.
        epsilon: added to the variance.
        dtype: dtype of the output.
        zero_scale: initialise the scale with 0, so that a residual branch starts as identity.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    zero_scale: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], *, train: bool, mask: Bool[Array, " batch"] | None
    ) -> Float[Array, "batch *rest"]:
        """Normalises `x`; `mask` marks the rows whose modality is present."""
        if mask is not None:
            # Statistics of no row at all are undefined; the caller discards them (training.step).
            mask = (mask | ~mask.any()).reshape(-1, *(1,) * (x.ndim - 1))
        scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            scale_init=scale_init,
            name="norm",
        )(x, mask=mask if train else None)
