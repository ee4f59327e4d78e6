"""Convolution, normalisation, patches and pooling shared by all encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.convolution import Lowering, convolve

Pool = Literal["mean", "max"]
Remat = Literal["none", "norms", "blocks"]

# Names of values that rematerialisation keeps, because they are expensive to compute.
CONVOLVED = "convolved"

_INITIALIZER = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def recomputed(
    function: Callable[[Any, Array], Array], remat: str
) -> Callable[[Any, Array], Array]:
    """A part of a network whose insides the backward pass computes again, to keep less of them.

    Args:
        function: maps a module, whose parameters keep their names, and its input to its output. It
            has to use the module that it is given: one from outside would update its statistics
            in both passes.
        remat: "none" keeps all that the gradient needs; "norms" keeps what convolutions return and
            computes normalisation and activation again; "blocks" keeps the part's input alone, and
            so does "norms" where nothing is convolved.

    Raises:
        UserError: if `remat` is unknown.
    """
    if remat == "none":
        return function
    policies = {
        "blocks": None,
        "norms": jax.checkpoint_policies.save_only_these_names(CONVOLVED),
    }
    if remat not in policies:
        raise UserError(f"unknown remat {remat!r}: use 'none', 'norms' or 'blocks'")
    return nn.remat(function, policy=policies[remat])


def run_block(block: nn.Module, remat: str, x: Array, **arguments: Any) -> Array:
    """Calls a block of a network; see `recomputed` for `remat`."""
    return recomputed(lambda block, x: block(x, **arguments), remat)(block, x)


class Conv3D(nn.Module):
    """A 3-D convolution without bias whose kernel may be lowered as a 2-D one.

    A kernel of shape (1, h, w) or (t, 1, 1) is the same function as a 2-D convolution over frames
    or over flattened pixels; `models.convolution` chooses. The parameters are the same for all
    forms.

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
        y = convolve(x.astype(self.dtype), kernel, self.strides, self.lowering)
        return checkpoint_name(y, CONVOLVED)


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
        y = convolve(x.astype(self.dtype), kernel, self.strides)
        return checkpoint_name(y, CONVOLVED)


class BatchNorm(nn.Module):
    """Batch normalisation over present rows only, statistics over the global batch in float32.

    Under `jit` with a sharded batch the mean is taken over all devices by construction, that is,
    this is synchronised batch normalisation. A row whose modality is missing enters neither the
    statistics of the batch nor the running ones.

    Attributes:
        momentum: weight of the old running statistics.
        epsilon: added to the variance.
        dtype: dtype of the output.
        zero_scale: initialise the scale with 0, so that a residual branch starts as identity.
        frozen: normalise by the running statistics in training too, and leave them as they are.
            Scale and shift remain trainable.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    zero_scale: bool = False
    frozen: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], *, train: bool, mask: Bool[Array, " batch"] | None
    ) -> Float[Array, "batch *rest"]:
        """Normalises `x`; `mask` marks the rows whose modality is present."""
        by_batch = train and not self.frozen
        if mask is not None:
            # Statistics of no row at all are undefined; the caller discards them (training.step).
            mask = (mask | ~mask.any()).reshape(-1, *(1,) * (x.ndim - 1))
        scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        return nn.BatchNorm(
            use_running_average=not by_batch,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            scale_init=scale_init,
            name="norm",
        )(x, mask=mask if by_batch else None)


def prepare_video(
    video: Float[Array, "batch time height width 3"],
    *,
    channel_mean: Sequence[float] | None,
    channel_std: Sequence[float] | None,
    subtract_time_mean: bool,
) -> Float[Array, "batch time height width 3"]:
    """Prepares pixels for the first layer of a video encoder.

    Args:
        video: pixels.
        channel_mean: subtracted from red, green and blue, then divided by `channel_std`; for
            weights from elsewhere, whose pixels arrive in [0, 1]. None leaves them.
        channel_std: see `channel_mean`; both or neither.
        subtract_time_mean: subtract the clip's mean frame, which leaves what moves.

    Raises:
        UserError: if only one of mean and standard deviation is given.
    """
    if (channel_mean is None) != (channel_std is None):
        raise UserError(
            f"channel_mean {channel_mean} and channel_std {channel_std} come together or not at all"
        )
    if channel_mean is not None:
        shape = (1,) * (video.ndim - 1) + (-1,)
        video = (video - jnp.array(channel_mean).reshape(shape)) / jnp.array(channel_std).reshape(
            shape
        )
    if subtract_time_mean:
        video = video - video.mean(axis=1, keepdims=True)
    return video


def patches(
    x: Float[Array, "batch *grid channels"], sizes: Sequence[int]
) -> Float[Array, "batch *cells values"]:
    """Cuts an array into patches that do not overlap, one row of values each.

    A patch and a dense layer are a strided convolution, which XLA's CPU backend does many times
    slower.

    Args:
        x: any number of axes between batch and channels.
        sizes: size of a patch along each of these axes; they divide the array.

    Returns:
        [batch, cells along each axis, product of sizes x channels].
    """
    batch, *grid, channels = x.shape
    cells = [length // size for length, size in zip(grid, sizes, strict=True)]
    split = [n for pair in zip(cells, sizes, strict=True) for n in pair]
    axes = len(grid)
    order = (
        0,
        *(1 + 2 * axis for axis in range(axes)),
        *(2 + 2 * axis for axis in range(axes)),
        1 + 2 * axes,
    )
    x = x.reshape(batch, *split, channels).transpose(order)
    return x.reshape(batch, *cells, math.prod(sizes) * channels)


def check_patch(
    patch: Sequence[int], shape: Sequence[int], *, names: tuple[str, str], settings: Sequence[str]
) -> None:
    """Checks that patches fill an input.

    Args:
        patch: size along each axis.
        shape: size of the input along each axis.
        names: name of the patch and of the input.
        settings: setting of the input's size along each axis.

    Raises:
        UserError: naming the settings to change.
    """
    misfits = {
        f"{setting} to a multiple of {size}": None
        for size, length, setting in zip(patch, shape, settings, strict=True)
        if length % size
    }
    if misfits:
        raise UserError(
            f"{names[0]} {tuple(patch)} must divide the {names[1]}'s "
            f"{'x'.join(str(length) for length in shape)}: set {' and '.join(misfits)}"
        )


def pool_features(
    x: Float[Array, "batch *grid channels"], pool: Pool
) -> Float[Array, "batch channels"]:
    """Reduces a feature map to one float32 feature a row: the mean, or the maximum as AVID does."""
    axes = tuple(range(1, x.ndim - 1))
    x = x.astype(jnp.float32)
    if pool == "mean":
        return x.mean(axis=axes)
    if pool == "max":
        return x.max(axis=axes)
    raise UserError(f"unknown pool {pool!r}: use 'mean' or 'max'")
