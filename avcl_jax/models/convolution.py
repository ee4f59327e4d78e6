"""Convolution, lowered to the form that is fast on the platform; equal results everywhere.

A TPU gets the convolution unchanged. For a GPU, XLA lays 3-D convolutions out with channels first,
for which there are no fast bfloat16 kernels, and its CPU backend has no fast 3-D kernel: on both, a
kernel of one frame or of one pixel becomes a 2-D convolution. On a CPU, XLA's gradient of a kernel
is also several times slower than the same sum as matrix products. This is the one place that
chooses; docs/performance.md has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Lowering = Literal["auto", "direct", "folded", "products"]
_Form = Callable[[Array, Array, tuple[int, ...]], Array]

# Measured: a matrix product over at least this many rows is faster in parts.
_SPLIT_ROWS, _PARTS = 2**15, 8
_FEW_CHANNELS = 4
# Rows and columns of a matrix unit, by JAX's name of the chip (v5e): of chips on which the compiler
# confirmed that packs pay, docs/performance.md.
_MATRIX_UNITS = {"TPU v5 lite": 128}


def matrix_unit(device_kind: str) -> int:
    """Channels that fill a matrix unit of a kind of device; 1 where nothing is to be packed."""
    return _MATRIX_UNITS.get(device_kind, 1)


def convolve(x: Array, kernel: Array, strides: Sequence[int], lowering: Lowering = "auto") -> Array:
    """Convolves channels-last arrays, padded by (kernel - 1) // 2 on both sides as in PyTorch.

    Args:
        x: [batch, *space, channels] with two or three dimensions of space.
        kernel: [*space, channels, features], of the same dtype.
        strides: one for each dimension of space.
        lowering: "direct" is one convolution, "folded" a 2-D one where the kernel allows it,
            "products" the same with matrix products for the gradient of the kernel. "auto" takes
            what the platform that the program is compiled for is fast at. All give the same
            numbers up to rounding.

    Returns:
        [batch, *space, features].
    """
    form = _by_platform if lowering == "auto" else _FORMS[lowering]
    return form(x, kernel, tuple(strides))


def _direct(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    space = "DHW"[-(x.ndim - 2) :]
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:-2]]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def convolve_packed(
    x: Array, kernel: Array, strides: Sequence[int], packs: tuple[int, int]
) -> Array:
    """`convolve` between arrays with neighbouring pixels of a row side by side as channels.

    One convolution: of each pair of a pixel of the input's pack and one of the output's, the kernel
    has the tap that joins them, or zeros.

    Args:
        x: [batch, *space, width / packs[0], packs[0] x channels].
        kernel: the one that `convolve` takes.
        strides: the ones that `convolve` takes, in pixels.
        packs: number of pixels in each one of the input and of the output; must divide the widths,
            and the first one `strides[-1]` times the second.

    Returns:
        [batch, *space, width / packs[1], packs[1] x features].
    """
    pack, out = packs
    size, channels, features = kernel.shape[-3:]
    stride, margin = strides[-1], (size - 1) // 2
    columns = (pack * x.shape[-2] + 2 * margin - size) // stride + 1
    if columns % out or stride * out % pack:
        raise ValueError(f"{columns} columns with stride {stride} cannot be packed as {packs}")
    # What the pixels of a pack of the output see, in packs of the input relative to its own.
    first, last = -margin // pack, (stride * (out - 1) + size - 1 - margin) // pack
    taps = last - first + 1
    shifted = []
    for pixel in range(out):
        before = stride * pixel - margin - first * pack
        margins = [(0, 0)] * kernel.ndim
        margins[-3] = (before, taps * pack - size - before)
        own = jnp.pad(kernel, margins)
        shifted.append(own.reshape(*kernel.shape[:-3], taps, pack * channels, features))
    kernel = jnp.concatenate(shifted, axis=-1)
    step = stride * out // pack
    padding = [((n - 1) // 2, (n - 1) // 2) for n in kernel.shape[:-3]]
    padding.append((-first, (columns // out - 1) * step + taps + first - x.shape[-2]))
    space = "DHW"[-(x.ndim - 2) :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    strides = (*strides[:-1], step)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def _folded(x: Array, kernel: Array, strides: tuple[int, ...], convolve: _Form = _direct) -> Array:
    """By 2-D convolutions over frames or over flattened pixels where the kernel allows it."""
    if x.ndim == 5:
        time, height, width = kernel.shape[:3]
        if time == 1 and strides[0] == 1:
            batch, frames = x.shape[:2]
            y = convolve(x.reshape(-1, *x.shape[2:]), kernel[0], strides[1:])
            return y.reshape(batch, frames, *y.shape[1:])
        if height == width == 1:
            x = x[:, :, :: strides[1], :: strides[2]]
            batch, frames, rows, columns, channels = x.shape
            x = x.reshape(batch, frames, rows * columns, channels)
            y = convolve(x, kernel[:, 0], (strides[0], 1))
            return y.reshape(batch, -1, rows, columns, kernel.shape[-1])
    return convolve(x, kernel, strides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """`_direct`, with a gradient of the kernel that a CPU computes fast."""
    return _direct(x, kernel, strides)


def _convolve_forward(x: Array, kernel: Array, strides: tuple[int, ...]) -> tuple[Array, Any]:
    return _direct(x, kernel, strides), (x, kernel)


def _convolve_backward(strides: tuple[int, ...], saved: Any, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _direct(x, kernel, strides), x)(dy)
    return dx, _kernel_gradient(x, dy, kernel.shape, strides).astype(kernel.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _products(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """`_folded`, with a gradient of the kernel that a CPU computes fast."""
    return _folded(x, kernel, strides, _convolve)


_FORMS: dict[str, _Form] = {"direct": _direct, "folded": _folded, "products": _products}
# Others, TPUs among them, take the direct form.
_OF_PLATFORM = {"cpu": "products", "cuda": "folded"}


def _kernel_gradient(
    x: Array, dy: Array, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Array:
    """Sum over all output pixels of what each tap of the kernel saw times the pixel's gradient."""
    *window, channels, features = shape
    margins = [(size - 1) // 2 for size in window]
    taps = list(np.ndindex(*window))
    if strides == (1,) * len(window) and features < channels:
        # A shift copies its array, so the smaller array is shifted, in the opposite direction.
        products = [_product(x, _shifted(dy, np.subtract(margins, tap))) for tap in taps]
        return jnp.stack(products).reshape(shape)
    padded = jnp.pad(x, [(0, 0), *((margin, margin) for margin in margins), (0, 0)])
    if channels <= _FEW_CHANNELS:
        # A product for each tap would be too thin: all taps side by side.
        seen = _seen_by_all(padded, window, strides, dy.shape[1:-1])
        return _product(seen, dy).reshape(shape)
    products = [_product(_seen_by(tap, padded, strides, dy.shape[1:-1]), dy) for tap in taps]
    return jnp.stack(products).reshape(shape)


def _shifted(dy: Array, by: np.ndarray) -> Array:
    """Pixel i of the result is pixel i + `by` of `dy`, or zero outside of it."""
    margins = [(0, 0, 0), *((-int(amount), int(amount), 0) for amount in by), (0, 0, 0)]
    return jax.lax.pad(dy, jnp.zeros((), dy.dtype), margins)


def _seen_by(
    tap: Sequence[int], padded: Array, strides: Sequence[int], sizes: Sequence[int]
) -> Array:
    """[batch, *sizes, channels] what one tap of the kernel sees at each output pixel."""
    space = [
        slice(first, first + stride * (size - 1) + 1, stride)
        for first, stride, size in zip(tap, strides, sizes, strict=True)
    ]
    return padded[:, *space]


def _seen_by_all(
    padded: Array, window: Sequence[int], strides: Sequence[int], sizes: Sequence[int]
) -> Array:
    """[batch, *sizes, *window, channels] what every tap sees at each output pixel."""
    axes = len(window)
    space = []
    for axis, (taps, stride, size) in enumerate(zip(window, strides, sizes, strict=True)):
        where = stride * np.arange(size)[:, None] + np.arange(taps)
        others = [other for other in range(2 * axes) if other not in (axis, axes + axis)]
        space.append(np.expand_dims(where, others))
    # A gather: XLA's CPU backend concatenates several times slower.
    return padded[:, *space]


def _product(left: Array, right: Array) -> Array:
    """left^T right with a row for each pixel of `right`, summed in float32."""
    right = right.reshape(-1, right.shape[-1])
    left = left.reshape(len(right), -1)
    parts = _PARTS if len(right) >= _SPLIT_ROWS and len(right) % _PARTS == 0 else 1
    products = jnp.einsum(
        "pri,pro->pio",
        left.reshape(parts, -1, left.shape[-1]),
        right.reshape(parts, -1, right.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return products.sum(axis=0)


def _choose(function: Callable[..., Any], *arrays: Array) -> Any:
    """Calls function(form, *arrays) with the form for the platform.

    The choice is made when the program is lowered for a platform, not when it is traced, so a
    program for a TPU may be compiled on a machine without one.
    """
    forms = {
        platform: functools.partial(function, _FORMS[name])
        for platform, name in _OF_PLATFORM.items()
    }
    return jax.lax.platform_dependent(
        *arrays, **forms, default=functools.partial(function, _direct)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_platform(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """Differentiated as a whole: that of a choice would keep what any of the forms needs."""
    return _choose(lambda form, x, kernel: form(x, kernel, strides), x, kernel)


def _by_platform_forward(x: Array, kernel: Array, strides: tuple[int, ...]) -> tuple[Array, Any]:
    return _by_platform(x, kernel, strides), (x, kernel)


def _by_platform_backward(strides: tuple[int, ...], saved: Any, dy: Array) -> tuple[Array, Array]:
    def gradients(form: _Form, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        if form is _products:  # has a gradient of its own
            return jax.vjp(lambda x, kernel: form(x, kernel, strides), x, kernel)[1](dy)
        # Linear in either: nothing is traced that has been computed before.
        (dx,) = jax.linear_transpose(lambda x: form(x, kernel, strides), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda kernel: form(x, kernel, strides), kernel)(dy)
        return dx, dkernel

    return _choose(gradients, *saved, dy)


_by_platform.defvjp(_by_platform_forward, _by_platform_backward)
