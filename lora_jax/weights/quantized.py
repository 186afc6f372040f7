"""Quantised matrices: whole numbers of few bits and the scales of blocks of them, and the float32 matrix that they stand for.

A `QuantFormat` says which arrays a matrix of PyTorch's layout (outputs, inputs) is held as, and turns one into the other with pure JAX
functions. Blocks lie along the inputs, so that an output's row is found without the others. Here are the formats that a scale and a whole
number make; those of bitsandbytes are in `four_bit.py`, those of GGUF files in `gguf_blocks.py`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError, nearest_numbers

Array = jax.Array
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class QuantFormat(ABC):
    """How a matrix is held. Formats are plain values: two with equal fields are the same.

    Attributes:
        axes: name of an array -> what each of its axes runs along: `out`, `in` (in blocks, bytes or as it is), `layers` or None. An array
            whose first axis is `out` holds the rows of the matrix one by one.
        whole: names of arrays that all matrices of a stack have in common, so that there are no layers in front of them.
    """

    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    whole: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is called in cards and messages."""

    @abstractmethod
    def check(self, outputs: int, inputs: int, where: str) -> None:
        """`InputError`, which names `where`, unless a matrix of this shape can be held so."""

    @abstractmethod
    def encode(self, weight: Array) -> Arrays:
        """The arrays of a matrix (outputs, inputs) float32: what is nearest to it."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, Array]) -> Array:
        """The matrix (outputs, inputs) float32 that these arrays stand for."""

    def picked(self, arrays: Mapping[str, Array]) -> Arrays:
        """The arrays of one matrix, which all other functions take: of `arrays` those in `whole` may hold all matrices of a stack."""
        return dict(arrays)

    def take(self, arrays: Mapping[str, Array], rows: Array) -> Arrays:
        """The arrays of some rows of the matrix, which `decode` takes: those at `rows`, (n,) int32."""
        return {name: jnp.take(array, rows, axis=0) for name, array in arrays.items()}

    def rows(self, arrays: Mapping[str, Array], first: Array | int, count: int) -> Arrays:
        """The arrays of `count` rows of the matrix from `first` on, which `decode` takes."""
        return {name: jax.lax.dynamic_slice_in_dim(array, first, count) for name, array in arrays.items()}

    def joins(self, outputs: int) -> bool:
        """Whether the arrays of matrices with so many outputs, put one after another, are those of all their outputs."""
        return True

    def shapes(self, outputs: int, inputs: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a matrix of this shape, as shapes."""
        return jax.eval_shape(self.encode, jax.ShapeDtypeStruct((outputs, inputs), jnp.float32))

    def bytes(self, outputs: int, inputs: int) -> int:
        """How many bytes a matrix of this shape takes."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.shapes(outputs, inputs).values())


def check_blocks(block: int, inputs: int, where: str, *, even: bool = False) -> None:
    """`InputError` unless whole blocks make a row.

    Args:
        block: numbers in a block.
        inputs: numbers in a row.
        where: of the message.
        even: whether a byte holds two numbers.
    """
    if inputs % block or (even and inputs % 2):
        fitting = [n for n in range(2, inputs + 1, 2) if inputs % n == 0]
        raise InputError(f"{where}: blocks of {block} do not divide its {inputs} inputs. {nearest_numbers(block, fitting)}")


def packed(codes: Array) -> Array:
    """Two numbers of four bits in a byte, the first of each pair in its upper half: (..., n) -> (..., n / 2) uint8."""
    return (codes[..., ::2] << 4 | codes[..., 1::2]).astype(jnp.uint8)


def unpacked(codes: Array) -> tuple[Array, Array]:
    """The first and the second number of every byte, each of the shape of `codes`."""
    return codes >> 4, codes & 15


def by_blocks(values: Array, scales: Array) -> Array:
    """`values` (..., n) times a scale for each of its blocks, (..., n / block)."""
    lead, blocks = values.shape[:-1], scales.shape[-1]
    return (values.reshape(*lead, blocks, -1) * scales[..., None]).reshape(values.shape)


def interleaved(first: Array, second: Array) -> Array:
    """The pairs of two arrays one after another: (..., n) each -> (..., 2 n)."""
    return jnp.stack([first, second], -1).reshape(*first.shape[:-1], -1)


def looked_up(codes: Array, table: Sequence[float]) -> Array:
    """`table[codes]`, for whole numbers below the table's length, a power of two.

    By selects: their number is that of the table's entries, and every device does them many at once.
    """
    values: list[Array] = [jnp.float32(value) for value in table]
    bit = 0
    while len(values) > 1:
        on = (codes >> bit) & 1 != 0
        values = [jnp.where(on, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        bit += 1
    return values[0]


@dataclasses.dataclass(frozen=True)
class WholeNumbers(QuantFormat):
    """Whole numbers of `bits` bits, symmetric about 0, by a scale for each block of a row, or for each row.

    With q = 2^(bits - 1) - 1 the scale of a block is `s = max |w| / q`, and a weight is `s round(w / s)`.

    Attributes:
        bits: 8 or 4; of 4 two are held in a byte (`packed`), 8 added to each.
        block: weights that share a scale; None: all of a row, which is an output channel.
    """

    bits: int
    block: int | None

    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"codes": ("out", "in"), "scales": ("out", "in")}

    @property
    def label(self) -> str:
        return f"int{self.bits}, " + ("a scale an output channel" if self.block is None else f"blocks of {self.block}")

    def check(self, outputs: int, inputs: int, where: str) -> None:
        check_blocks(self.block or inputs, inputs, where, even=self.bits == 4)

    def encode(self, weight: Array) -> Arrays:
        most = 2 ** (self.bits - 1) - 1
        outputs, inputs = weight.shape
        blocks = weight.reshape(outputs, -1, self.block or inputs)
        scales = jnp.abs(blocks).max(-1) / most
        codes = jnp.clip(jnp.round(blocks / jnp.where(scales > 0, scales, 1)[..., None]), -most, most).reshape(outputs, inputs)
        return {"codes": packed((codes + 8).astype(jnp.uint8)) if self.bits == 4 else codes.astype(jnp.int8), "scales": scales}

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        codes, scales = arrays["codes"], arrays["scales"]
        if self.bits == 8:
            return by_blocks(codes.astype(jnp.float32), scales)
        return interleaved(*(by_blocks(half.astype(jnp.float32) - 8, scales) for half in unpacked(codes)))


@dataclasses.dataclass(frozen=True)
class Float8(QuantFormat):
    """Numbers of 8 bits with a floating point, times a float32 scale for each block of outputs by inputs, as safetensors files have them.

    Attributes:
        dtype: `float8_e4m3fn` or `float8_e5m2`.
        block: outputs and inputs that share a scale; (0, 0): all do.
    """

    dtype: str
    block: tuple[int, int]

    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"codes": ("out", "in"), "scales": (None, None)}

    @property
    def label(self) -> str:
        return self.dtype + ("" if self.block == (0, 0) else f", blocks of {self.block[0]} by {self.block[1]}")

    def check(self, outputs: int, inputs: int, where: str) -> None:
        """All shapes do: the last blocks may be smaller."""

    def encode(self, weight: Array) -> Arrays:
        block = self._block(weight.shape)
        counts = [-(-size // b) for size, b in zip(weight.shape, block, strict=True)]
        padded = jnp.pad(weight, [(0, count * b - size) for count, b, size in zip(counts, block, weight.shape, strict=True)])
        largest = jnp.abs(padded).reshape(counts[0], block[0], counts[1], block[1]).max((1, 3))
        scales = largest / float(jnp.finfo(self.dtype).max)
        spread = self._spread(jnp.where(scales > 0, scales, 1), weight.shape)
        return {"codes": (weight / spread).astype(self.dtype), "scales": scales}

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        codes, scales = arrays["codes"], arrays["scales"]
        return codes.astype(jnp.float32) * (scales if scales.ndim < 2 else self._spread(scales, codes.shape))

    def take(self, arrays: Mapping[str, Array], rows: Array) -> Arrays:
        codes, (outputs, inputs) = arrays["codes"], self._block(arrays["codes"].shape)
        scales = jnp.repeat(jnp.take(arrays["scales"], rows // outputs, axis=0), inputs, axis=1)[:, : codes.shape[1]]
        return {"codes": jnp.take(codes, rows, axis=0).astype(jnp.float32) * scales, "scales": jnp.float32(1)}

    def rows(self, arrays: Mapping[str, Array], first: Array | int, count: int) -> Arrays:
        return self.take(arrays, first + jnp.arange(count))

    def joins(self, outputs: int) -> bool:
        return self.block[0] > 0 and outputs % self.block[0] == 0

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        outputs, inputs = self.block
        return outputs or shape[0], inputs or shape[1]

    def _spread(self, scales: Array, shape: tuple[int, ...]) -> Array:
        """A scale for each weight: (outputs, inputs)."""
        outputs, inputs = self._block(shape)
        return jnp.repeat(jnp.repeat(scales, outputs, axis=0)[: shape[0]], inputs, axis=1)[:, : shape[1]]


@dataclasses.dataclass(frozen=True)
class Mixed(QuantFormat):
    """The matrices of a stack of layers, in several formats: files spend more bits on some layers than on others.

    Each format's arrays hold the layers that have it, under the names `array_0`, `array_1`, ...; `place` says of a layer which format it
    has, and where among those layers it is.

    Attributes:
        forms: the formats.
        of_layer: for each layer the index of its own.
    """

    forms: tuple[QuantFormat, ...]
    of_layer: tuple[int, ...]

    @property
    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Of all arrays."""
        own = {f"{name}_{i}": ("layers", *axes) for i, form in enumerate(self.forms) for name, axes in form.axes.items()}
        return {"place": (None,), **own}

    @property
    def whole(self) -> frozenset[str]:
        """All but `place`."""
        return frozenset(self.axes) - {"place"}

    @property
    def label(self) -> str:
        return " and ".join(form.label for form in self.forms)

    def check(self, outputs: int, inputs: int, where: str) -> None:
        for form in self.forms:
            form.check(outputs, inputs, where)

    def encode(self, weight: Array) -> Arrays:
        raise InputError(f"{self.label}: layers in several formats are not quantised again. Merge without --requantize.")

    def picked(self, arrays: Mapping[str, Array]) -> Arrays:
        """Of the layer's own format its arrays; of the others those of some other layer, which nothing reads."""
        place = arrays["place"]
        one = {n: jax.lax.dynamic_index_in_dim(a, place[1], keepdims=False) for n, a in arrays.items() if n != "place"}
        return {"place": place, **one}

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        def one(i: int, form: QuantFormat) -> Callable[[], Array]:
            return lambda: form.decode({name: arrays[f"{name}_{i}"] for name in form.axes})

        return jax.lax.switch(arrays["place"][0], [one(i, form) for i, form in enumerate(self.forms)])

    def places(self) -> np.ndarray:
        """(layers, 2) int32."""
        return np.array([(form, self.of_layer[:layer].count(form)) for layer, form in enumerate(self.of_layer)], np.int32)

    def stacked_shapes(self, outputs: int, inputs: int, layers: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a stack, as shapes."""
        found = {"place": jax.ShapeDtypeStruct((layers, 2), np.int32)}
        for i, form in enumerate(self.forms):
            for name, shape in form.shapes(outputs, inputs).items():
                found[f"{name}_{i}"] = jax.ShapeDtypeStruct((self.of_layer.count(i), *shape.shape), shape.dtype)
        return found

    def stack(self, layers: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a stack from those of its layers."""
        found = {"place": self.places()}
        for i, form in enumerate(self.forms):
            own = [arrays for arrays, of in zip(layers, self.of_layer, strict=True) if of == i]
            found |= {f"{name}_{i}": np.stack([arrays[name] for arrays in own]) for name in form.axes}
        return found
