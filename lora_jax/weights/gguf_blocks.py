"""Blocks of GGUF files held as they are stored, and the float32 weights that they stand for, as the `gguf` package has them.

A block's parts (its scales, the bits of its numbers) are arrays of their own here: the same bytes, sorted. Blocks of the older types hold
32 weights, those of the K types 256 in smaller blocks with whole-number scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from .quantized import Array, Arrays, QuantFormat, check_blocks

Parts = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A type of block.

    Attributes:
        size: weights in one.
        parts: name -> (dtype, how many) in the order of the bytes.
        decode: the parts, (..., blocks, how many) each, to weights (..., blocks, size) float32.
    """

    size: int
    parts: Mapping[str, tuple[str, int]]
    decode: Callable[[Parts], Array]


def _float(part: Array) -> Array:
    return part.astype(jnp.float32)


def _shifted(part: Array, shifts: tuple[int, ...], mask: int) -> Array:
    """(..., n) bytes -> (..., shifts, n): the bits that each shift brings down."""
    return (part[..., None, :] >> jnp.array(shifts, jnp.uint8)[:, None]) & mask


def _joined(part: Array, axes: int = 2) -> Array:
    """The last axes as one."""
    return part.reshape(*part.shape[:-axes], -1)


def _halves(nibbles: Array) -> Array:
    """16 bytes -> 32 numbers of 4 bits: the lower halves of all bytes, then the upper."""
    return _joined(_shifted(nibbles, (0, 4), 15))


def _q4_0(p: Parts) -> Array:
    return _float(p["delta"]) * (_float(_halves(p["codes"])) - 8)


def _q4_1(p: Parts) -> Array:
    return _float(p["delta"]) * _float(_halves(p["codes"])) + _float(p["least"])


def _fifth(high: Array) -> Array:
    """4 bytes -> 32 bits, the lowest of each byte first."""
    return _joined((high[..., :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1)


def _q5_0(p: Parts) -> Array:
    return _float(p["delta"]) * (_float(_halves(p["codes"]) | _fifth(p["high"]) << 4) - 16)


def _q5_1(p: Parts) -> Array:
    return _float(p["delta"]) * _float(_halves(p["codes"]) | _fifth(p["high"]) << 4) + _float(p["least"])


def _q8_0(p: Parts) -> Array:
    return _float(p["codes"]) * _float(p["delta"])


def _six_bits(p: Parts) -> tuple[Array, Array]:
    """The scale and the least value of each of 8 small blocks, 6 bits each in 12 bytes: (..., blocks, 8) both, float32."""
    scales, least, upper = jnp.split(p["scales"], 3, -1)
    of_scale = jnp.concatenate([scales & 63, (upper & 15) | ((scales >> 2) & 48)], -1)
    of_least = jnp.concatenate([least & 63, (upper >> 4) | ((least >> 2) & 48)], -1)
    return _float(p["delta"]) * _float(of_scale), _float(p["least"]) * _float(of_least)


def _pairs_of_32(codes: Array) -> Array:
    """128 bytes -> (8, 32) numbers of 4 bits: of each 32 bytes the lower halves, then the upper."""
    by_32 = codes.reshape(*codes.shape[:-1], 4, 32)
    return _shifted(by_32, (0, 4), 15).reshape(*codes.shape[:-1], 8, 32)


def _q4_k(p: Parts) -> Array:
    scale, least = _six_bits(p)
    return _joined(scale[..., None] * _float(_pairs_of_32(p["codes"])) - least[..., None])


def _q5_k(p: Parts) -> Array:
    scale, least = _six_bits(p)
    codes = _pairs_of_32(p["codes"]) | _shifted(p["high"], tuple(range(8)), 1) << 4
    return _joined(scale[..., None] * _float(codes) - least[..., None])


def _q6_k(p: Parts) -> Array:
    lead = p["low"].shape[:-1]
    low = _shifted(p["low"].reshape(*lead, 2, 64), (0, 4), 15).reshape(*lead, 8, 32)
    high = _shifted(p["high"].reshape(*lead, 2, 32), (0, 2, 4, 6), 3).reshape(*lead, 8, 32)
    codes = (_float(low | high << 4) - 32).reshape(*lead, 16, 16)
    return _joined((_float(p["delta"]) * _float(p["scales"]))[..., None] * codes)


_HALF = {"delta": ("float16", 1)}
_LEAST = {"least": ("float16", 1)}
_KINDS = {
    "Q4_0": _Kind(32, _HALF | {"codes": ("uint8", 16)}, _q4_0),
    "Q4_1": _Kind(32, _HALF | _LEAST | {"codes": ("uint8", 16)}, _q4_1),
    "Q5_0": _Kind(32, _HALF | {"high": ("uint8", 4), "codes": ("uint8", 16)}, _q5_0),
    "Q5_1": _Kind(32, _HALF | _LEAST | {"high": ("uint8", 4), "codes": ("uint8", 16)}, _q5_1),
    "Q8_0": _Kind(32, _HALF | {"codes": ("int8", 32)}, _q8_0),
    "Q4_K": _Kind(256, _HALF | _LEAST | {"scales": ("uint8", 12), "codes": ("uint8", 128)}, _q4_k),
    "Q5_K": _Kind(256, _HALF | _LEAST | {"scales": ("uint8", 12), "high": ("uint8", 32), "codes": ("uint8", 128)}, _q5_k),
    "Q6_K": _Kind(256, {"low": ("uint8", 128), "high": ("uint8", 64), "scales": ("int8", 16)} | _HALF, _q6_k),
}
# Types that can be held as they are stored.
KINDS = tuple(_KINDS)


@dataclasses.dataclass(frozen=True)
class Blocks(QuantFormat):
    """The blocks of a GGUF type.

    Attributes:
        kind: its name: `Q4_1`, `Q6_K`, ...
    """

    kind: str

    @property
    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Each part is (outputs, blocks of a row, how many)."""
        return dict.fromkeys(_KINDS[self.kind].parts, ("out", "in", None))

    @property
    def label(self) -> str:
        return f"GGUF's {self.kind}"

    def check(self, outputs: int, inputs: int, where: str) -> None:
        check_blocks(_KINDS[self.kind].size, inputs, where)

    def encode(self, weight: Array) -> Arrays:
        raise InputError(f"{self.label}: nothing here quantises to this type: such blocks come from files. Merge without --requantize.")

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        return _joined(_KINDS[self.kind].decode(arrays))

    def shapes(self, outputs: int, inputs: int) -> dict[str, jax.ShapeDtypeStruct]:
        kind = _KINDS[self.kind]
        blocks = (outputs, inputs // kind.size)
        return {name: jax.ShapeDtypeStruct((*blocks, count), dtype) for name, (dtype, count) in kind.parts.items()}

    def stored(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of rows as a file has them, (rows, bytes of a row) uint8."""
        kind, found, at = _KINDS[self.kind], {}, 0
        sizes = {name: count * np.dtype(dtype).itemsize for name, (dtype, count) in kind.parts.items()}
        blocks = raw.reshape(len(raw), -1, sum(sizes.values()))
        for name, (dtype, _) in kind.parts.items():
            found[name] = np.ascontiguousarray(blocks[..., at : at + sizes[name]]).view(dtype)
            at += sizes[name]
        return found
