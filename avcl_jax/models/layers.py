"""Layers shared by all encoders, and the settings and steps that their classes have in common."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.convolution import Lowering, convolve, convolve_packed

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


class EncoderModule(nn.Module, kw_only=True):
    """Settings of every encoder; see `encoders.EncoderContract` for the contract.

    Attributes:
        remat: see `recomputed`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    remat: Remat = "none"
    dtype: Any = jnp.float32

    def run(self, block: nn.Module, x: Array, **arguments: Any) -> Array:
        """Calls a block of the network, rematerialised as `remat` says."""
        return recomputed(lambda block, x: block(x, **arguments), self.remat)(block, x)


class NormEncoder(EncoderModule, kw_only=True):
    """Settings of encoders with batch normalisation.

    Attributes:
        norm_momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
        norm_epsilon: added to the variance.
        freeze_norm: see `BatchNorm.frozen`.
    """

    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    freeze_norm: bool = False

    @property
    def norm(self) -> functools.partial[BatchNorm]:
        """Makes a `BatchNorm` with these settings."""
        return functools.partial(
            BatchNorm,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.freeze_norm,
            dtype=self.dtype,
        )


class VideoEncoder(EncoderModule, kw_only=True):
    """Settings of video encoders, and the preparation of their pixels.

    Attributes:
        subtract_time_mean: subtract the clip's mean frame, which leaves what moves.
        channel_mean: subtracted from red, green and blue, then divided by `channel_std`; for
            weights from elsewhere, whose pixels arrive in [0, 1]. None leaves them.
        channel_std: see `channel_mean`; both or neither.
    """

    subtract_time_mean: bool
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None

    def prepare(
        self, video: Float[Array, "batch time height width 3"], *, subtract_time_mean: bool
    ) -> Float[Array, "batch time height width 3"]:
        """Prepares pixels for the first layer.

        Raises:
            UserError: if only one of mean and standard deviation is set.
        """
        mean, std = self.channel_mean, self.channel_std
        if mean is not None and std is not None:
            shape = (1,) * (video.ndim - 1) + (-1,)
            video = (video - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)
        elif mean is not None or std is not None:
            raise UserError(
                f"channel_mean {mean} and channel_std {std} come together or not at all"
            )
        if subtract_time_mean:
            video = video - video.mean(axis=1, keepdims=True)
        return video.astype(self.dtype)


class Conv(nn.Module):
    """A 2-D or 3-D convolution without bias, padded by (kernel - 1) // 2 as in PyTorch's encoders.

    A 3-D kernel of shape (1, h, w) or (t, 1, 1) is the same function as a 2-D convolution over
    frames or over flattened pixels; `models.convolution` chooses. The parameters are the same for
    all forms.

    Attributes:
        features: output channels.
        kernel_size: (time, height, width), or (frames, mels).
        strides: along the same axes.
        lowering: see `convolve`.
        dtype: compute dtype; parameters are float32.
        packs: see `convolve_packed`, which other packs than (1, 1) take.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    lowering: Lowering = "auto"
    dtype: Any = jnp.float32
    packs: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channels"]) -> Array:
        """Convolves to [batch, *space / strides, features]."""
        channels = x.shape[-1] // self.packs[0]
        kernel = self.param(
            "kernel", _INITIALIZER, (*self.kernel_size, channels, self.features), jnp.float32
        ).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.packs == (1, 1):
            y = convolve(x, kernel, self.strides, self.lowering)
        else:
            y = convolve_packed(x, kernel, self.strides, self.packs)
        return checkpoint_name(y, CONVOLVED)


class _Norm(nn.Module):
    """`nn.BatchNorm`, which cannot average over pixels that are side by side as channels."""

    momentum: float
    epsilon: float
    dtype: Any
    zero_scale: bool
    pack: int
    by_batch: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        channels = (x.shape[-1] // self.pack,)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", zeros if self.zero_scale else ones, channels, jnp.float32)
        bias = self.param("bias", zeros, channels, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if self.by_batch:

            def average(values: Array) -> Array:
                means = values.mean(tuple(range(x.ndim - 1)), where=mask)
                return means.reshape(self.pack, -1).mean(axis=0)

            values = x.astype(jnp.float32)
            mean, square = average(values), average(jnp.square(values))
            var = jnp.maximum(0.0, square - jnp.square(mean))
            if not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * var
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        mean, factor, bias = (
            jnp.tile(value, self.pack).reshape((1,) * (x.ndim - 1) + (-1,))
            for value in (mean, factor, bias)
        )
        return ((x - mean) * factor + bias).astype(self.dtype)


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
        pack: pixels side by side as channels, which have one scale, shift and statistics.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    zero_scale: bool = False
    frozen: bool = False
    pack: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], *, train: bool, mask: Bool[Array, " batch"] | None
    ) -> Float[Array, "batch *rest"]:
        """Normalises `x`; `mask` marks the rows whose modality is present."""
        by_batch = train and not self.frozen
        if mask is not None:
            # Statistics of no row at all are undefined; the caller discards them (training.step).
            mask = (mask | ~mask.any()).reshape(-1, *(1,) * (x.ndim - 1))
        norm = _Norm(
            self.momentum,
            self.epsilon,
            self.dtype,
            self.zero_scale,
            self.pack,
            by_batch,
            name="norm",
        )
        return norm(x, mask if by_batch else None)


def patches(
    x: Float[Array, "batch *grid channels"],
    sizes: Sequence[int],
    *,
    names: tuple[str, str],
    settings: Sequence[str],
) -> Float[Array, "batch *cells values"]:
    """Cuts an array into patches that do not overlap, one row of values each.

    A patch and a dense layer are a strided convolution, which XLA's CPU backend does many times
    slower.

    Args:
        x: any number of axes between batch and channels.
        sizes: size of a patch along each of these axes.
        names: name of the patch and of the array, for the error.
        settings: setting of the array's size along each axis, likewise.

    Returns:
        [batch, cells along each axis, product of sizes x channels].

    Raises:
        UserError: naming the settings to change, if patches do not fill the array.
    """
    batch, *grid, channels = x.shape
    misfits = {
        f"{setting} to a multiple of {size}": None
        for size, length, setting in zip(sizes, grid, settings, strict=True)
        if length % size
    }
    if misfits:
        raise UserError(
            f"{names[0]} {tuple(sizes)} must divide the {names[1]}'s "
            f"{'x'.join(str(length) for length in grid)}: set {' and '.join(misfits)}"
        )
    cells = [length // size for length, size in zip(grid, sizes, strict=True)]
    split = [n for pair in zip(cells, sizes, strict=True) for n in pair]
    axes = len(grid)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    x = x.reshape(batch, *split, channels).transpose(order)
    return x.reshape(batch, *cells, math.prod(sizes) * channels)


def encoded(x: Float[Array, "batch *grid channels"], pool: Pool = "mean") -> dict[str, Array]:
    """Result of an encoder: the map `x`, and its mean or maximum as float32 features."""
    axes = tuple(range(1, x.ndim - 1))
    values = x.astype(jnp.float32)
    if pool == "mean":
        return {"features": values.mean(axis=axes), "map": x}
    if pool == "max":
        # The gradient of `max` divides by the number of values that equal it: none, where XLA
        # computes them again with other rounding, as it does under rematerialisation.
        flat = values.reshape(len(x), -1, x.shape[-1])
        places = jnp.arange(flat.shape[1]).reshape(1, -1, 1)
        largest = places == flat.argmax(axis=1, keepdims=True)
        return {"features": jnp.where(largest, flat, 0).sum(axis=1), "map": x}
    raise UserError(f"unknown pool {pool!r}: use 'mean' or 'max'")


def check_stages(widths: Sequence[int], depths: Sequence[int]) -> None:
    """Checks that every stage of a residual network has a width and a depth.

    Raises:
        UserError: if the numbers of both differ.
    """
    if len(widths) != len(depths):
        raise UserError(f"widths {tuple(widths)} and depths {tuple(depths)} must be equally long")
