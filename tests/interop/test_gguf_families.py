"""GGUF files of every decoder family against transformers, on tiny random models.

transformers' GGUF reader knows no Gemma 1, Granite, OLMo 2, SmolLM3 and GPT-NeoX, and gives Gemma 2 and 3 the scale of scores of one
size of model. So logits are compared with the model that was converted, and tensors with what transformers reads of the file where it can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from tokenizers.pre_tokenizers import ByteLevel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import lora_jax
from lora_jax.models.families import gguf_architectures
from lora_jax.weights.load import open_checkpoint
from tests import tiny
from tests.gguf_files import write_gguf
from tests.interop.zoo import VOCAB, ZOO, Zoo

pytestmark = pytest.mark.interop

CONVERTED = ["llama-gqa-bias", "mistral-wide-heads", "qwen2", "qwen3", "granite", "gemma-mqa", "gemma2", "gemma3-scaled", "phi3-longrope",
             "olmo2", "smollm3", "gpt2", "gpt_neox"]  # fmt: skip
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
# Files say nothing of how the scores of a Gemma are scaled.
CHANGED = {"gemma2": {"query_pre_attn_scalar": 16}}
# What the converter leaves to the file's own keys.
EXTRA = {
    "gemma3-scaled": {"gemma3.attention.sliding_window_pattern": [True, False, True], "gemma3.rope.freq_base_swa": 100.0},
}


ALPHABET = sorted(ByteLevel.alphabet())[: VOCAB - 1]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*ALPHABET, ALPHABET[0] + ALPHABET[1]],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": [f"{ALPHABET[0]} {ALPHABET[1]}"],
    "tokenizer.ggml.eos_token_id": 2,
}


def converted(zoo: Zoo, name: str, file: Path, **options: Any) -> Any:
    """Writes the model as GGUF; the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        zoo.source(name), attn_implementation="eager", dtype=torch.float32, **CHANGED.get(name, {})
    )
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    write_gguf(file, model.config.to_dict(), tensors, extra=TOKENIZER | EXTRA.get(name, {}), **options)
    return model.eval()


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_of_every_family(zoo: Zoo, name: str, tmp_path: Path):
    """Of the model here, and of the checkpoint that it is exported as."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 24))
    with torch.no_grad():
        expected = converted(zoo, name, tmp_path / "m.gguf")(torch.tensor(tokens)).logits.numpy()
    with tiny.quick_compile():
        model = lora_jax.load_model(str(tmp_path / "m.gguf"))
        logits = np.asarray(model(jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The config that was made of the metadata is one that transformers reads, and means the same.
    lora_jax.save_pretrained(model, tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(saved(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONVERTED if ZOO[name].family in READ_BY_TRANSFORMERS])
def test_tensors_are_those_that_transformers_reads(zoo: Zoo, name: str, tmp_path: Path):
    """Quantised, too: every module in another of the kinds whose blocks are as long as these rows.

    It is given the config: of the file it reads no width of Qwen 3's heads, no bias of a Llama, no number of GPT-2's positions.
    """
    kinds = {"attn_q": Q.Q4_0, "attn_k": Q.Q4_1, "attn_v": Q.Q5_0, "attn_qkv": Q.Q5_1, "attn_output": Q.Q8_0, "ffn_gate": Q.Q8_0,
             "ffn_up": Q.BF16, "token_embd": Q.Q8_0}  # fmt: skip
    config = converted(zoo, name, tmp_path / "m.gguf", kinds=kinds).config
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    theirs = {key: value.numpy() for key, value in read.state_dict().items()}
    ours = open_checkpoint(tmp_path / "m.gguf", architectures=gguf_architectures())
    assert set(theirs) - set(ours.names()) <= {"lm_head.weight"}  # tied
    for tensor in ours.names():
        np.testing.assert_array_equal(ours.read(tensor), theirs[tensor], err_msg=tensor)
