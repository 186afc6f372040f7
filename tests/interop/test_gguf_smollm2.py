"""The real SmolLM2: read from Q4_1 blocks, written with an adapter merged, read again; and the real Gemma 3's tokenizer handed on."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.interop.gguf.model import write_model
from lora_jax.weights.gguf_header import read_gguf
from lora_jax.weights.load import resolve
from tests import tiny

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("dtype", "far", "size"), [("float16", 0.01, 271e6), ("q8_0", 0.1, 145e6), ("q4_0", None, 92e6)])
def test_smollm2_is_merged_written_read_and_answers(smollm2_source: str, dtype: str, far: float | None, size: float, tmp_path: Path):
    model = tiny.trained(lora_jax.load_model(smollm2_source), targets=["q_proj", "down_proj"], alpha=0.1)
    write_model(model, tmp_path / "m.gguf", dtype=dtype)
    assert abs((tmp_path / "m.gguf").stat().st_size / size - 1) < 0.02
    read, tokenizer = lora_jax.load_model(str(tmp_path / "m.gguf")), lora_jax.load_tokenizer(tmp_path / "m.gguf")
    ids = jnp.asarray(tokenizer(["The quick brown fox jumps over the lazy dog and runs away."])["input_ids"], jnp.int32)
    got, expected = tiny.outputs(read, ids), tiny.outputs(model, ids)
    if far is not None:
        assert np.abs(got - expected).max() < far * np.abs(expected).max()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str) and prompt.startswith("<|im_start|>system")
    if dtype != "q4_0":
        assert "Paris" in (lora_jax.generate(read, [prompt], tokenizer, max_new_tokens=24)[0].text or "")


def test_gemma3_is_handed_on(gemma3_source: str, tmp_path: Path):
    """Settings, tokenizer and every tensor: of a file in, the same of the file out."""
    model = lora_jax.load_model(gemma3_source)
    write_model(model, tmp_path / "m.gguf", dtype="bfloat16")
    again = read_gguf(tmp_path / "m.gguf")
    first = read_gguf(resolve(gemma3_source, key="source"))
    assert {k: v for k, v in again.metadata.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in first.metadata.items() if k.startswith("tokenizer.")
    }
    assert again.tensors.keys() == first.tensors.keys()
    for key in ("block_count", "attention.sliding_window", "rope.freq_base", "attention.head_count_kv"):
        assert again.metadata[f"gemma3.{key}"] == first.metadata[f"gemma3.{key}"]
