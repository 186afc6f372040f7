"""Four-bit weights beside bitsandbytes, and a model of PEFT over them."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

from lora_jax.weights.four_bit import DYNAMIC, FourBit
from lora_jax.weights.load import open_checkpoint

warnings.filterwarnings("ignore", module="bitsandbytes")
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.interop

SHAPES = [(192, 576), (576, 1536), (64, 64), (1000, 192)]


def real_weights(source: str) -> list[np.ndarray]:
    from lora_jax.models.families import gguf_architectures

    checkpoint = open_checkpoint(source, architectures=gguf_architectures())
    layer = "model.layers.{}.{}.weight"
    names = [("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")[i % 4] for i in range(10)]
    return [checkpoint.read(layer.format(3 * i, name)) for i, name in enumerate(names)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_are_equal_bit_for_bit(kind, smollm2_source):
    assert np.array_equal(DYNAMIC, functional.create_dynamic_map().numpy())
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal(SHAPES[i % 4]) * 10.0 ** rng.uniform(-4, 1)).astype(np.float32) for i in range(10)]
    weights[2][5] = 0
    form = FourBit(kind, 64, True)
    encode, decode, encode_once = jax.jit(form.encode), jax.jit(form.decode), jax.jit(FourBit(kind, 64, False).encode)
    for weight in [*weights, *real_weights(smollm2_source)] if kind == "nf4" else weights[:3]:
        codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, compress_statistics=True, quant_type=kind)
        own = encode(weight)
        # The mean is PyTorch's float32 sum there, in the order of this machine's vectors; the last bit of it is not ours.
        assert abs(float(own["absmax_mean"]) / state.offset.item() - 1) < 5e-7
        made = {name: np.asarray(array) for name, array in encode(weight, state.offset.numpy()).items()}
        assert np.array_equal(made["codes"].reshape(-1), codes.numpy().reshape(-1))
        assert np.array_equal(made["absmax"].reshape(-1), state.absmax.numpy().reshape(-1))
        assert np.array_equal(made["absmax_scale"], state.state2.absmax.numpy())
        wanted = functional.dequantize_4bit(codes, state).numpy()
        assert np.abs(np.asarray(decode(made)) - wanted).max() <= 1e-6 * np.abs(wanted).max()
        apart = np.abs(np.asarray(decode(own)) - wanted) > 1e-6 * np.abs(wanted).max()
        assert apart.mean() < 0.01  # a scale may have its neighbour's code
        single, plain = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type=kind)
        once = encode_once(weight)
        assert np.array_equal(np.asarray(once["codes"]).reshape(-1), single.numpy().reshape(-1))
        assert np.array_equal(np.asarray(once["absmax"]).reshape(-1), plain.absmax.numpy().reshape(-1))
