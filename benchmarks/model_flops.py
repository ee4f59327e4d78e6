"""Floating-point operations of convolutions and matrix products, counted in what JAX traced.

This is what "model FLOPs" of a utilisation means: nothing that a compiler adds, pads or recomputes
enters, nor normalisation, activations and whatever else runs on the vector units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core


def _convolution(equation: Any) -> int:
    """Two operations for every multiplication; those by the zeros of dilated inputs are none."""
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
            # A convolution has a form for each platform. What one of them does beyond the least,
            # such as multiplying by the zeros of a border, is not useful work.
            total += min(_count(branch.jaxpr) for branch in equation.params["branches"])
            continue
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += repeats * _count(inner)
    return total


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of all convolutions and matrix products that `function` traces.

    Args:
        function: anything that can be traced.
        *arguments: arrays or their shapes.

    Returns:
        Multiplications and additions; a loop of known length counts as often as it runs.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)
