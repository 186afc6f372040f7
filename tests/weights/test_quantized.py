"""Quantised storage beside transcriptions in float64 and beside the `gguf` package."""

from __future__ import annotations

from typing import Any

import gguf
import jax
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.weights.four_bit import DYNAMIC, FP4, NESTED, NF4, FourBit, exact_mean
from lora_jax.weights.gguf_blocks import KINDS, Blocks
from lora_jax.weights.quantized import Float8, WholeNumbers

RNG = np.random.default_rng(0)


def weight(outputs: int = 48, inputs: int = 192, scale: float = 0.05) -> np.ndarray:
    drawn = (RNG.standard_normal((outputs, inputs)) * scale).astype(np.float32)
    drawn[3, :64] = 0
    return drawn


def encode(form: Any, matrix: np.ndarray) -> Any:
    return {name: np.asarray(array) for name, array in jax.jit(form.encode)(matrix).items()}


def decode(form: Any, arrays: Any) -> np.ndarray:
    return np.asarray(jax.jit(form.decode)(arrays))


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bits_are_the_nearest_of_16_values_times_the_largest_magnitude(kind, table):
    matrix = weight()
    form = FourBit(kind, 64, False)
    arrays = encode(form, matrix)
    blocks = matrix.astype(np.float64).reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    relative = blocks / np.where(largest > 0, largest, 1)
    distance = np.abs(relative[..., None] - np.array(table))
    codes = np.stack([arrays["codes"] >> 4, arrays["codes"] & 15], -1).reshape(relative.shape)
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
    assert (chosen <= distance.min(-1) + 1e-7).all()  # the nearest, but for ties
    assert np.array_equal(arrays["absmax"].reshape(-1), largest.reshape(-1).astype(np.float32))
    assert np.abs(decode(form, arrays) - (np.array(table)[codes] * largest).reshape(matrix.shape)).max() < 1e-7


def test_double_quantisation_holds_the_magnitudes_in_a_byte():
    form = FourBit("nf4", 64, True)
    matrix = weight(100, 192)
    once, twice = encode(FourBit("nf4", 64, False), matrix), encode(form, matrix)
    assert np.array_equal(once["codes"], twice["codes"]) and twice["absmax"].dtype == np.uint8
    centred = once["absmax"].reshape(-1).astype(np.float64) - once["absmax"].astype(np.float64).mean()
    centred = np.pad(centred, (0, -centred.size % NESTED)).reshape(-1, NESTED)
    scale = np.abs(centred).max(1)
    assert np.allclose(twice["absmax_scale"], scale, rtol=1e-5)
    nearest = np.abs(centred[..., None] / scale[:, None, None] - DYNAMIC.astype(np.float64)).min(-1) * scale[:, None]
    held = (DYNAMIC.astype(np.float64)[twice["absmax"]].reshape(-1) * np.repeat(scale, NESTED)[: once["absmax"].size]) + twice[
        "absmax_mean"
    ]
    # As near as any of the 256 values, but for the rounding of the quotient to 65,536 places.
    assert (np.abs(held - once["absmax"].reshape(-1)) <= nearest.reshape(-1)[: held.size] + 2 * scale.max() / 65536 + 1e-8).all()
    assert form.bytes(100, 192) == 100 * 96 + 300 + 2 * 4 + 4


def test_the_mean_of_magnitudes_is_exact():
    values = np.abs(RNG.standard_normal(10007)).astype(np.float32) * 10.0 ** RNG.integers(-3, 3, 10007).astype(np.float32)
    assert abs(float(jax.jit(exact_mean)(values)) / values.astype(np.float64).mean() - 1) < 1.2e-7


@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 64), (4, 32), (4, None)])
def test_whole_numbers_are_rounded_to_nearest(bits, block):
    matrix, most = weight(), 2 ** (bits - 1) - 1
    form = WholeNumbers(bits, block)
    blocks = matrix.astype(np.float64).reshape(48, -1, block or 192)
    unit = np.abs(blocks).max(-1, keepdims=True) / most
    exact = (np.rint(blocks / np.where(unit > 0, unit, 1)) * unit).reshape(matrix.shape)
    made = decode(form, encode(form, matrix))
    assert np.abs(made - exact).max() < np.abs(exact).max() * 2e-7 + (unit.max() * 1.01 if np.abs(made - exact).max() > 1e-6 else 0)
    assert (np.abs(made - exact) > 1e-6).mean() < 1e-3  # quotients at a half may go the other way


FORMS = [FourBit("nf4", 64, True), FourBit("fp4", 32, False), WholeNumbers(8, None), WholeNumbers(4, 64)]
FORMS += [Float8("float8_e4m3fn", (16, 64)), Float8("float8_e5m2", (0, 0))]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_taken_as_they_lie_in_the_whole(form: Any):
    matrix, rows = weight(), np.array([5, 0, 47, 3, 5])
    arrays = encode(form, matrix)
    taken = decode(form, {k: np.asarray(v) for k, v in form.take(arrays, rows).items()})
    assert np.abs(taken - decode(form, arrays)[rows]).max() < 1e-7  # a product and a sum may be fused
    assert {n: (s.shape, s.dtype) for n, s in form.shapes(48, 192).items()} == {n: (a.shape, a.dtype) for n, a in arrays.items()}


def test_float8_is_near_and_keeps_its_scales():
    matrix = weight(40, 100)
    for form in (Float8("float8_e4m3fn", (16, 64)), Float8("float8_e4m3fn", (0, 0))):
        arrays = encode(form, matrix)
        assert np.abs(decode(form, arrays) - matrix).max() < np.abs(matrix).max() / 16


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_what_the_gguf_package_makes_of_them(kind):
    kind_of = getattr(gguf.GGMLQuantizationType, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind_of]
    raw = RNG.integers(0, 256, (6, 512 // block, size), dtype=np.uint8)
    form: Any = Blocks(kind)
    # Scales are halves: any but infinite ones and what is no number.
    at = {"Q6_K": [size - 2]}.get(kind, [0] if kind in ("Q4_0", "Q5_0", "Q8_0") else [0, 2])
    for place in at:
        raw[..., place : place + 2] = RNG.standard_normal((6, 512 // block, 1)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(6, -1)
    wanted = gguf.quants.dequantize(raw, kind_of)
    parts = form.stored(raw)
    made = decode(form, parts)
    # To the rounding of one product and sum, which may be fused.
    assert np.abs(made - wanted).max() <= 2e-7 * np.abs(wanted).max()
    if kind in ("Q4_0", "Q5_0", "Q8_0", "Q6_K"):
        assert np.array_equal(made, wanted)
    assert sum(part.nbytes for part in parts.values()) == raw.nbytes == form.bytes(6, 512)
    assert np.array_equal(decode(form, {k: np.asarray(v) for k, v in form.take(parts, np.array([4, 1])).items()}), made[[4, 1]])


@pytest.mark.parametrize(("form", "inputs"), [(FourBit("nf4", 64, True), 96), (WholeNumbers(4, 64), 96), (Blocks("Q4_K"), 576)])
def test_a_block_that_does_not_divide(form, inputs):
    with pytest.raises(InputError, match=rf"q_proj: blocks of \d+ do not divide its {inputs} inputs. Nearest: "):
        form.check(8, inputs, "q_proj")
