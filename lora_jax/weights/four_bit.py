"""NF4 and FP4, weights of four bits as bitsandbytes holds them (QLoRA, arXiv:2305.14314, section 3).

A block of weights is divided by its largest magnitude and each rounded to the nearest of 16 values: quantiles of a normal distribution
(nf4), or a float of 4 bits (fp4). Double quantisation holds those magnitudes, less their mean, as 8 bits by a scale for each 256 of them.
Codes, magnitudes and their codes are the bits that bitsandbytes' CPU build computes from the same mean. Its own mean is PyTorch's float32
sum, whose order follows from the machine's vector unit: here the exact sum is rounded, which is the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from .quantized import Array, Arrays, QuantFormat, by_blocks, check_blocks, looked_up, packed

# Quantiles of N(0, 1) scaled to [-1, 1] (appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, exponent and mantissa bits (1, 2, 1), scaled to [-1, 1]: what the codes 0 to 15 stand for.
_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32)
FP4 = tuple(float(v) for v in np.concatenate([_FP4, -_FP4]) / np.float32(12))
# Codes in the order of their values. fp4 has two zeros: what is just below 0 becomes the one, what is just above the other.
_ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
_TABLES = {"nf4": NF4, "fp4": FP4}
# (256, 2): what the two numbers of a byte stand for, that of its upper half first.
_PAIRS = {kind: np.stack([np.repeat(np.float32(t), 16), np.tile(np.float32(t), 16)], 1) for kind, t in _TABLES.items()}

# Magnitudes of blocks that share a scale.
NESTED = 256


def _dynamic_map() -> np.ndarray:
    """(256,) float32, ascending: what 8 bits with a moving point stand for (arXiv:1511.04561), from -1 to 1."""
    found = [np.array([0, 1], np.float32)]
    low = np.float32(0.1)
    for exponent in range(7):
        steps = 2**exponent
        step, at = np.float64((1 - low) / np.float32(steps)), np.arange(steps + 1)
        # PyTorch's linspace: from either end to the middle, each rounded once.
        bounds = np.where(at < (steps + 1) // 2, low + step * at, 1 - step * (steps - at)).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [means, -means]
    return np.sort(np.concatenate(found))


DYNAMIC = _dynamic_map()


def exact_mean(values: Array) -> Array:
    """The mean of (n,) float32, a scalar: summed in pairs with what each addition loses, so that it is the same on every device."""
    size = 1 << max(0, int(values.size - 1).bit_length())
    high = jnp.pad(values.reshape(-1), (0, size - values.size))
    low = jnp.zeros_like(high)
    while high.size > 1:
        a, b = jnp.split(high, 2)
        total = a + b
        # Knuth's two-sum: what is lost is known exactly.
        part = total - a
        low = sum(jnp.split(low, 2)) + ((a - (total - part)) + (b - part))
        high = total
    return ((high + low) / values.size)[0]


@dataclasses.dataclass(frozen=True)
class FourBit(QuantFormat):
    """NF4 or FP4.

    Attributes:
        kind: `nf4` or `fp4`.
        block: weights that share a magnitude.
        double: whether the magnitudes are quantised too.
    """

    kind: str
    block: int
    double: bool

    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "codes": ("out", "in"),
        "absmax": ("out", "in"),
        "absmax_scale": (None,),
        "absmax_mean": (),
    }

    @property
    def label(self) -> str:
        return f"{self.kind}, blocks of {self.block}" + (", double quantisation" if self.double else "")

    def check(self, outputs: int, inputs: int, where: str) -> None:
        check_blocks(self.block, inputs, where, even=True)

    def encode(self, weight: Array, mean: Array | None = None) -> Arrays:
        """The arrays of a matrix (outputs, inputs) float32.

        Args:
            weight: the matrix.
            mean: of the blocks' magnitudes; computed by default.

        Returns:
            `codes` (outputs, inputs / 2) uint8 and `absmax` (outputs, inputs / block), float32 or with double quantisation uint8; then
            also `absmax_scale` (blocks / 256, rounded up) float32 and `absmax_mean` () float32.
        """
        outputs, inputs = weight.shape
        blocks = weight.reshape(outputs, -1, self.block)
        absmax = jnp.abs(blocks).max(-1)
        relative = jnp.clip(blocks * (1 / jnp.where(absmax > 0, absmax, 1))[..., None], -1, 1).reshape(outputs, inputs)
        order = _ORDER[self.kind]
        values = np.array(_TABLES[self.kind], np.float32)[list(order)]
        bounds = jnp.asarray((values[:-1] + values[1:]) / np.float32(2))
        place = (relative[..., None] > bounds).astype(jnp.uint8).sum(-1, dtype=jnp.uint8)
        codes = packed(place if self.kind == "nf4" else looked_up(place, order).astype(jnp.uint8))
        if not self.double:
            return {"codes": codes, "absmax": absmax}
        mean = exact_mean(absmax) if mean is None else mean
        nested, scale = _nested(absmax.reshape(-1) - mean)
        return {"codes": codes, "absmax": nested.reshape(absmax.shape), "absmax_scale": scale, "absmax_mean": mean}

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        codes = arrays["codes"]
        # Both numbers of a byte at once: one look-up in 256 pairs. For selects among 16 values XLA kept 16 arrays: a GB at 1B shapes.
        pairs = jnp.asarray(_PAIRS[self.kind]).at[codes].get(mode="promise_in_bounds")
        return by_blocks(pairs.reshape(*codes.shape[:-1], -1), self._absmax(arrays))

    def take(self, arrays: Mapping[str, Array], rows: Array) -> Arrays:
        codes, absmax = (jnp.take(arrays[name], rows, axis=0) for name in ("codes", "absmax"))
        if self.double:
            blocks = absmax.shape[1]
            scale = arrays["absmax_scale"][(rows[:, None] * blocks + jnp.arange(blocks)) // NESTED]
            absmax = jnp.asarray(DYNAMIC)[absmax] * scale + arrays["absmax_mean"]
        return {"codes": codes, "absmax": absmax}

    def rows(self, arrays: Mapping[str, Array], first: Array | int, count: int) -> Arrays:
        return self.take(arrays, first + jnp.arange(count))

    def _absmax(self, arrays: Mapping[str, Array]) -> Array:
        absmax = arrays["absmax"]
        if "absmax_scale" not in arrays:
            return absmax
        scale = jnp.repeat(arrays["absmax_scale"], NESTED)[: absmax.size].reshape(absmax.shape)
        return jnp.asarray(DYNAMIC)[absmax] * scale + arrays["absmax_mean"]


def _nested(values: Array) -> tuple[Array, Array]:
    """8-bit codes (n,) of float32 numbers, and the scale of each 256 of them.

    bitsandbytes first rounds the quotient to one of 65,536 places between -1 and 1, and takes what is nearest to that.
    """
    blocks = jnp.pad(values, (0, -values.size % NESTED)).reshape(-1, NESTED)
    scale = jnp.abs(blocks).max(-1)
    relative = jnp.clip(blocks * (1 / jnp.where(scale > 0, scale, 1))[:, None], -1, 1)
    place = ((relative + 1) * jnp.float32(0.5) * 65535 + jnp.float32(0.5)).astype(jnp.int32)
    codes = jnp.where(scale[:, None] > 0, jnp.asarray(_NEAREST)[place], 0)
    return codes.reshape(-1)[: values.size].astype(jnp.uint8), scale


def _nearest() -> np.ndarray:
    """(65536,) uint8: the code that is nearest to each place."""
    places = np.float32(-1) + (2 * np.arange(65536)).astype(np.float32) / np.float32(65535)
    return np.asarray(np.searchsorted((DYNAMIC[:-1] + DYNAMIC[1:]) * np.float32(0.5), places), np.uint8)


_NEAREST = _nearest()
