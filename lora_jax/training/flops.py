"""Arithmetic of a computation, counted on what JAX traces of it: XLA's own count takes the body of a scan once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count_flops(traced: ClosedJaxpr) -> int:
    """Additions and multiplications of the matrix products and convolutions in a traced computation, those in loops as often as they run.

    What no result depends on is not counted, as XLA drops it. All else (norms, activations, softmax, the optimizer) is left out: it is
    a few percent where matrices are of useful size.

    >>> count_flops(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    jaxpr = traced.jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "ragged_dot_general":  # each row with one group's weights, whatever the compiler makes of it
            numbers = equation.params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batched) = numbers.dot_dimension_numbers
            rows, weights = (v.aval.shape for v in equation.invars[:2])
            known = {*contracted, *batched, *numbers.rhs_group_dimensions}
            total += 2 * math.prod(rows) * math.prod(size for i, size in enumerate(weights) if i not in known)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
        elif name == "scan":
            total += equation.params["length"] * _count(equation.params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The computations that an equation calls (`jit`, `checkpoint`, `custom_vjp`, ...), each once."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
