"""Convolutions as methods know sites: inputs are the features of all places of the kernel, outputs its channels.

A matrix (inputs, n) at such a site is a kernel of n channels. LoRA's A is then a convolution with the site's stride, padding and dilation
to r channels, and B a 1 x 1 convolution, as in PEFT.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Pads = list[tuple[int, int]]


def unfit_convolution(conv: nnx.Conv) -> str | None:
    """Why a convolution cannot be a site; None where it can.

    >>> unfit_convolution(nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)))
    'a grouped convolution (feature_group_count = 4): a low-rank change of its kernel would mix the groups'
    """
    if (groups := conv.feature_group_count) != 1:
        return f"a grouped convolution (feature_group_count = {groups}): a low-rank change of its kernel would mix the groups"
    if conv.mask is not None:
        return "a convolution with a mask"
    if set(_each(conv, conv.input_dilation)) != {1}:
        return "a convolution with input_dilation"
    return None if conv.conv_general_dilated is jax.lax.conv_general_dilated else "it has a conv_general_dilated of its own"


def convolve(conv: nnx.Conv, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """What a convolution computes with a matrix (inputs, n) in the place of its kernel, without its bias.

    Where n is small beside the channels, x is multiplied with all places of the kernel at once and the products are then shifted and added
    (arXiv:1709.03395, kn2row). Where each member has its own kernel and its own x, XLA would run a grouped convolution: with the gradient
    it took ten times as long on a CPU.

    Args:
        conv: a convolution that is a site.
        x: (..., spatial axes, channels).
        matrix: (inputs, n), rows in the order of the kernel's axes.

    Returns:
        (..., spatial axes, n), in the dtype of x.
    """
    dims, window, strides = len(conv.kernel_size), tuple(conv.kernel_size), _each(conv, conv.strides)
    lead = x.shape[: x.ndim - dims - 1]
    x, pads = _padded(conv, x.reshape(-1, *x.shape[x.ndim - dims - 1 :]))
    kernel = matrix.reshape(*window, x.shape[-1], matrix.shape[-1])
    if matrix.shape[-1] < x.shape[-1] or math.prod(window) == 1:
        y = _shifted(jnp.pad(x, [(0, 0), *pads, (0, 0)]), kernel, strides, _each(conv, conv.kernel_dilation))
    else:
        spatial = "DHW"[-dims:] if dims <= 3 else "".join(map(str, range(dims)))
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        y = jax.lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=_each(conv, conv.kernel_dilation), dimension_numbers=numbers
        )
    return y.reshape(*lead, *y.shape[1:])


def _each(conv: nnx.Conv, value: Any) -> tuple[int, ...]:
    """A value of each spatial axis."""
    return (value or 1,) * len(conv.kernel_size) if value is None or isinstance(value, int) else tuple(value)


def _padded(conv: nnx.Conv, x: jax.Array) -> tuple[jax.Array, Pads]:
    """The input (n, spatial axes, channels), padded where that is not with zeros; and how many zeros come before and behind each axis."""
    padding, dims = conv.padding, len(conv.kernel_size)
    reach = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, _each(conv, conv.kernel_dilation), strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in reach), (0, 0)]
        return jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "reflect"), [(0, 0)] * dims
    if padding == "CAUSAL":
        return x, [(reach[0] - 1, 0)]
    if isinstance(padding, str):
        strides = _each(conv, conv.strides)
        return x, list(jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding))
    pairs = (padding,) * dims if isinstance(padding, int) else padding
    return x, [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in pairs]


def _shifted(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], dilation: tuple[int, ...]) -> jax.Array:
    """A convolution without padding, as products of x with the kernel's places.

    A place of the kernel meets every `strides`-th row and column of x, from its own offset on. Those whose offsets differ by multiples of
    the strides meet the same ones, shifted: these are multiplied at once.
    """
    window = kernel.shape[:-2]
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[1:-1], window, dilation, strides, strict=True)]
    phases: dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for place in itertools.product(*map(range, window)):
        offset = [p * d for p, d in zip(place, dilation, strict=True)]
        phase = tuple(o % s for o, s in zip(offset, strides, strict=True))
        phases.setdefault(phase, []).append((place, tuple(o // s for o, s in zip(offset, strides, strict=True))))
    total: Any = 0
    for phase, places in phases.items():
        rows = x[(slice(None), *(slice(p, None, s) for p, s in zip(phase, strides, strict=True)))]
        columns = jnp.stack([kernel[place] for place, _ in places], axis=-2)
        total += _sum_of_shifted(rows, columns, tuple(shift for _, shift in places), tuple(sizes))
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_of_shifted(rows: jax.Array, columns: jax.Array, shifts: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> jax.Array:
    """The products of x with each place of a kernel, shifted and added.

    JAX's own gradient pads the gradient of every product to all of them and adds these up: it took ten times as long as the rest.

    Args:
        rows: (n, spatial axes, channels).
        columns: (channels, places, outputs).
        shifts: by how much each place's product is shifted.
        sizes: of the result's spatial axes.

    Returns:
        (n, *sizes, outputs).
    """
    outputs = columns.shape[-1]
    products = jnp.matmul(rows, columns.reshape(columns.shape[0], -1))
    total: Any = 0
    for i, shift in enumerate(shifts):
        there = (slice(at, at + n) for at, n in zip(shift, sizes, strict=True))
        total += products[(slice(None), *there, slice(i * outputs, (i + 1) * outputs))]
    return total


def _forward(rows: jax.Array, columns: jax.Array, shifts: Any, sizes: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_shifted(rows, columns, shifts, sizes), (rows, columns)


def _backward(shifts: Any, sizes: Any, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = kept
    room = [(at, n) for at, n in zip(rows.shape[1:-1], sizes, strict=True)]
    back = [jnp.pad(dy, [(0, 0), *((at, whole - at - n) for at, (whole, n) in zip(s, room, strict=True)), (0, 0)]) for s in shifts]
    products = jnp.concatenate(back, axis=-1)  # of the gradient: (n, spatial axes, places * outputs)
    over = tuple(range(rows.ndim - 1))
    own = jnp.tensordot(rows, products, (over, over)).reshape(columns.shape)
    return jnp.matmul(products, columns.reshape(columns.shape[0], -1).T), own


_sum_of_shifted.defvjp(_forward, _backward)


class ConvolvedSite:
    """The site of a convolution as methods know sites.

    Args:
        site: an adapted site; all but its base is reached as it is.
        x: its input.

    Attributes:
        x: the same.
        base: its `kernel` is (inputs, outputs), its `bias` (outputs,) or None.
    """

    def __init__(self, site: Any, x: jax.Array):
        self._site, self.x = site, x
        self.base = _ConvolvedBase(site.base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """x convolved with a matrix (inputs, n)."""
        return convolve(self._site.base, x, matrix)

    def unfold(self, y: jax.Array) -> jax.Array:
        """y itself."""
        return y


class _ConvolvedBase:
    def __init__(self, base: nnx.Conv):
        self._base = base

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._base(x)

    @property
    def kernel(self) -> jax.Array:
        return self._base.kernel[...].reshape(-1, self._base.out_features)

    @property
    def bias(self) -> jax.Array | None:
        return None if self._base.bias is None else self._base.bias[...]
