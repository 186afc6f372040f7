"""Layers with kernels of several axes: `nnx.LinearGeneral`, `nnx.Einsum` and `nnx.Conv` as methods know sites, with one axis of inputs and
one of outputs.

An einsum is such a layer where each axis of its kernel is either contracted with the input or an axis of the result. A convolution is
one whose inputs are those of all places of its kernel; it is never computed so (`adapters/convolution.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .convolution import ConvolvedSite, unfit_convolution

GENERAL = (nnx.LinearGeneral, nnx.Einsum, nnx.Conv)

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


def unfit(module: nnx.Module) -> str | None:
    """Why a module of a type in `GENERAL` cannot be a site; None where it can.

    >>> unfit(nnx.Einsum("btd,hdk->bthk", (2, 4, 3), rngs=nnx.Rngs(0)))
    >>> unfit(nnx.Einsum("bhd,hdk->bhk", (2, 4, 3), rngs=nnx.Rngs(0)))
    "nnx.Einsum 'bhd,hdk->bhk' is no plain contraction with its kernel: axis h is a batch axis"
    """
    if isinstance(module, nnx.LinearGeneral):
        return "nnx.LinearGeneral with batch axes is not supported" if module.batch_axis else None
    if isinstance(module, nnx.Conv):
        return unfit_convolution(module)
    assert isinstance(module, nnx.Einsum)
    why = _not_plain(module)
    return why and f"nnx.Einsum '{module.einsum_str}' is no plain contraction with its kernel: {why}"


def _not_plain(module: nnx.Einsum) -> str | None:
    x, kernel, result = terms = _terms(module)
    for axis in kernel:
        if axis == _ANY:
            return "the kernel has an ellipsis"
        if (axis in x) == (axis in result):
            return f"axis {axis} is a batch axis" if axis in x else f"the kernel is summed over its axis {axis}"
    for axis in x:
        if axis not in kernel and axis not in result:
            return f"the input is summed over its axis {axis}"
    if any(len(set(term)) < len(term) for term in terms):
        return "an axis stands twice in a term"
    if not 0 < sum(axis in x for axis in kernel) < len(kernel):
        return f"the kernel has no axis of {'outputs' if set(kernel) <= set(x) else 'inputs'}"
    return None if module.einsum_op is jnp.einsum else "it has an einsum_op of its own"


_ANY = "..."


def _terms(module: nnx.Einsum) -> tuple[list[str], list[str], list[str]]:
    """The axes of input, kernel and result; `...` is one entry."""
    operands, _, result = module.einsum_str.partition("->")
    x, _, kernel = operands.partition(",")
    split = [[_ANY if axis == "." else axis for axis in term.replace(_ANY, ".")] for term in (x, kernel, result)]
    return split[0], split[1], split[2]


def kernel_axes(module: nnx.Module) -> tuple[list[int], int]:
    """The axes of one layer's kernel, the inputs first in the input's order, then the outputs in the result's; and how many are inputs."""
    if isinstance(module, nnx.LinearGeneral):
        return list(range(len(module.in_features) + len(module.out_features))), len(module.in_features)
    if isinstance(module, nnx.Conv):
        return list(range(len(module.kernel_shape))), len(module.kernel_shape) - 1
    assert isinstance(module, nnx.Einsum)
    x, kernel, result = _terms(module)
    inputs, outputs = ([kernel.index(axis) for axis in term if axis in kernel] for term in (x, result))
    return inputs + outputs, len(inputs)


def window_of(module: nnx.Module) -> tuple[tuple[int, ...], bool]:
    """The sizes of a convolution's kernel, and whether it has gaps; none of other modules."""
    if not isinstance(module, nnx.Conv):
        return (), False
    gaps = module.kernel_dilation
    return tuple(module.kernel_size), any(d not in (None, 1) for d in ([gaps] if isinstance(gaps, int | None) else gaps))


def flat_kernel(module: nnx.Module, kernel: AnyArray) -> AnyArray:
    """(..., inputs, outputs) of a kernel as the module has it, stacked layers in front of both."""
    axes, inputs = kernel_axes(module)
    lead = kernel.ndim - len(axes)
    ordered = kernel.transpose(*range(lead), *(lead + axis for axis in axes))
    return ordered.reshape(*ordered.shape[:lead], math.prod(ordered.shape[lead : lead + inputs]), -1)


def own_kernel(module: Any, flat: jax.Array) -> jax.Array:
    """The kernel as the module has it; `flat_kernel` backwards."""
    axes, _ = kernel_axes(module)
    lead = flat.ndim - 2
    sizes = module.kernel.shape[-len(axes) :]
    ordered = flat.reshape(*flat.shape[:lead], *(sizes[axis] for axis in axes))
    return ordered.transpose(*range(lead), *(lead + int(place) for place in np.argsort(axes)))


def _places(module: nnx.Module, ndim: int) -> tuple[list[int], list[int]]:
    """For an input of so many axes: those that are contracted; and the result's axes, those kept of the input first, then the outputs."""
    if isinstance(module, nnx.LinearGeneral):
        # As Flax takes them, whatever the order they were given in.
        contracted = sorted(axis % ndim for axis in module.axis)
        return contracted, list(range(ndim - len(contracted) + len(module.out_features)))
    assert isinstance(module, nnx.Einsum)
    x, kernel, result = _terms(module)
    x, result = (_spelled(term, ndim - len(x) + 1) for term in (x, result))
    order = [result.index(axis) for axis in x if axis not in kernel]
    outputs = [place for place, axis in enumerate(result) if axis in kernel]
    return [place for place, axis in enumerate(x) if axis in kernel], order + outputs


def _spelled(term: Sequence[str], count: int) -> list[str]:
    """A term with so many axes in place of its ellipsis."""
    return [name for axis in term for name in ([f"{_ANY}{i}" for i in range(count)] if axis == _ANY else [axis])]


def flat_site(site: Any, x: jax.Array) -> FlatSite | ConvolvedSite:
    """The site of a layer in `GENERAL` and its input, as methods know sites."""
    return (ConvolvedSite if isinstance(site.base, nnx.Conv) else FlatSite)(site, x)


class FlatSite:
    """The site of a layer over several axes as methods know sites: one axis of inputs and one of outputs, both of them last.

    Args:
        site: an adapted site; all but its base is reached as it is.
        x: its input; any axes may be the contracted ones.

    Attributes:
        x: (..., inputs).
        base: takes (..., inputs), gives (..., outputs); its `kernel` is (inputs, outputs), its `bias` (outputs,) or None.
    """

    def __init__(self, site: Any, x: jax.Array):
        self._site = site
        contracted, self._order = _places(site.base, x.ndim)
        kept = [axis for axis in range(x.ndim) if axis not in contracted]
        self._lead = tuple(x.shape[axis] for axis in kept)
        axes, inputs = kernel_axes(site.base)
        sizes = site.base.kernel.shape
        self._out = tuple(sizes[axis] for axis in axes[inputs:])
        self.x = x.transpose(*kept, *contracted).reshape(*self._lead, -1)
        ins = tuple(sizes[axis] for axis in axes[:inputs])
        self.base = _FlatBase(site.base, (*self._lead, *ins), [*kept, *contracted], self._order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def unfold(self, y: jax.Array) -> jax.Array:
        """(..., outputs) as the base gives it."""
        return y.reshape(*self._lead, *self._out).transpose(*np.argsort(self._order))


class _FlatBase:
    def __init__(self, base: Any, shape: tuple[int, ...], order: list[int], result: list[int]):
        self._base, self._shape, self._order, self._result = base, shape, order, result

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._base(x.reshape(self._shape).transpose(*np.argsort(self._order))).transpose(*self._result)
        return y.reshape(*x.shape[:-1], -1)

    @property
    def kernel(self) -> jax.Array:
        return flat_kernel(self._base, self._base.kernel[...])

    @property
    def bias(self) -> jax.Array | None:
        return None if self._base.bias is None else self._base.bias[...].reshape(-1)
