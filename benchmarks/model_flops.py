"""Floating-point operations of convolutions and matrix products, counted in a traced function.

These are the "model FLOPs" of a utilisation: without additions, padding or recomputation by the
compiler, and without normalisation, activations and other operations on the vector units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core


def _convolution(equation: Any) -> int:
    """Two operations per multiplication, without those by the zeros of dilated inputs."""
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    spatial = math.prod(kernel[axis] for axis in numbers.rhs_spec[2:])
    channels = kernel[numbers.rhs_spec[1]]
    dilation = math.prod(equation.params["lhs_dilation"])
    groups = equation.params["batch_group_count"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * spatial * channels // dilation // groups


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * depth


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            total += _convolution(equation)
        elif equation.primitive.name == "dot_general":
            total += _product(equation)
        elif equation.primitive.name == "cond":
            # A convolution has a form for each platform. Work beyond that of the cheapest form,
            # such as multiplying by the zeros of a border, is not useful.
            total += min(_count(branch.jaxpr) for branch in equation.params["branches"])
            continue
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += repeats * _count(inner)
    return total


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiplications and additions of all convolutions and matrix products of a function.

    Loops of known length count with their number of iterations.

    Args:
        function: traceable function.
        *arguments: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)
