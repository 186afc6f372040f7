"""`lora-jax export --format gguf` and `gguf-lora`: what they write of a run, tokenizers, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.interop.gguf.lora import write_adapter
from lora_jax.interop.gguf.model import write_model
from lora_jax.interop.gguf.tokenizer import tokenizer_metadata
from lora_jax.sweeps.restore import restore_member, run_members
from lora_jax.weights.gguf_header import read_gguf
from lora_jax.weights.tokenizer import load_tokenizer
from tests import gguf_tokens, tiny
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")
ROWS = 300


def llama(hub: Any, folder: Path, tokenizer: Any, **names: str) -> Path:
    """The tiny Llama with another tokenizer, and an embedding of `ROWS` rows for it."""
    shutil.copytree(hub.llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": ROWS, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.random.default_rng(3).standard_normal((ROWS, 32)).astype(np.float32) * 0.3
    save_file(tensors, folder / "model.safetensors")
    gguf_tokens.save(tokenizer, folder, **names)
    return folder


@pytest.fixture(scope="module")
def source(hub, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "m"
    return llama(hub, folder, gguf_tokens.byte_level(), eos_token="<|end|>")


@pytest.fixture(scope="module")
def run(hub, source, tmp_path_factory, compile_cache) -> Path:
    folder = tmp_path_factory.mktemp("run")
    changes = {"model.source": str(source), "training.steps": 3, "training.eval_every": 3, "optimizer.learning_rate": 0.1}
    result = call("train", hub.write(folder, changes | {"task.max_length": 64}, causal=True))
    assert result.code == 0, result.err
    return folder / "runs" / "tiny"


@pytest.mark.slow
def test_a_run_as_a_model_and_as_an_adapter(run, tmp_path):
    for form, options in (("gguf", ("--dtype", "float16")), ("gguf-lora", ())):
        result = call("export", run, "--format", form, "--out", tmp_path / form, *options)
        assert result.code == 0, result.err
    header = read_gguf(tmp_path / "gguf" / "model.gguf")
    assert header.metadata["general.file_type"] == 1 and header.metadata["tokenizer.chat_template"] == gguf_tokens.TEMPLATE
    assert {p.name for p in (tmp_path / "gguf").iterdir()} == {"model.gguf", "README.md"}
    restored: Any = restore_member(run, run_members(run)[0]).model
    model, trained = lora_jax.load_model(str(tmp_path / "gguf")), restored.base
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, ROWS, (2, 9)), jnp.int32)
    plain = lora_jax.load_model(str(trained.origin.source))
    got, expected, before = (tiny.outputs(m, tokens) for m in (model, trained, plain))
    assert np.abs(got - expected).max() < 2e-2 < np.abs(before - expected).max()
    factors = read_gguf(tmp_path / "gguf-lora" / "adapter.gguf")
    assert factors.metadata["adapter.lora.alpha"] == 16.0
    assert set(factors.tensors) == {f"blk.{i}.attn_{p}.weight.lora_{f}" for i in range(3) for p in "qv" for f in "ab"}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama3", "qwen2", "deepseek-v3", "gpt-4o"])
def test_the_rule_that_cuts_words_is_found(hub, pre, tmp_path):
    path = llama(hub, tmp_path / "m", gguf_tokens.byte_level(pre), eos_token="<|end|>")
    found = tokenizer_metadata(str(path), ROWS, {})
    assert found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.eos_token_id"] == 266 and found["tokenizer.ggml.token_type"][266:269] == [3, 4, 5]
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_a_sentencepiece_tokenizer(hub, tmp_path):
    path = llama(hub, tmp_path / "m", gguf_tokens.sentencepiece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    write_model(lora_jax.load_model(str(path)), tmp_path / "m.gguf")
    theirs, ours = load_tokenizer(path), load_tokenizer(tmp_path / "m.gguf")
    for text in ("then another  one", "the hint, 1 é", " on air"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.decode(ours(text)["input_ids"]) == theirs.decode(
            theirs(text)["input_ids"]
        )
    assert read_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.add_bos_token"] is True
    # From a GGUF file to a GGUF file, keys are handed on.
    write_model(lora_jax.load_model(str(tmp_path / "m.gguf")), tmp_path / "again.gguf")
    first, again = (read_gguf(tmp_path / name).metadata for name in ("m.gguf", "again.gguf"))
    assert first == again


def test_tokenizers_that_gguf_cannot_say(hub, source):
    with pytest.raises(lora_jax.InputError, match="of the kind WordLevel"):
        tokenizer_metadata(str(hub.llama), 100, {})
    with pytest.raises(lora_jax.InputError, match="has the token 267, and the embedding 200 rows"):
        tokenizer_metadata(str(source), 200, {})


def test_what_an_adapter_file_cannot_hold(source, tmp_path):
    base = lora_jax.load_model(str(source))
    rngs = nnx.Rngs(0)
    for section, said in (
        ({"method": "dora", "targets": ["q_proj"]}, "'dora' changes a weight by more than"),
        ({"targets": ["embed"]}, "the embedding, which is the projection"),
        ({"method": "full"}, "itself, and llama.cpp adds to weights alone"),
        ({"targets": ["q_proj"], "modules_to_save": ["final_norm"]}, "final_norm.scale' itself"),
        ({"targets": ["q_proj"]}, "changes nothing"),
    ):
        with pytest.raises(lora_jax.InputError, match=said):
            write_adapter(lora_jax.inject(base, tiny.adapter(**section), rngs=rngs), tmp_path / "a.gguf")


def test_an_encoder_and_an_unknown_type_are_refused(hub, tmp_path):
    result = call("export", tmp_path, "--format", "gguf", "--dtype", "q4_k", "--out", tmp_path / "out")
    assert result.code == 2 and "--dtype: unknown value 'q4_k'" in result.err and "'q4_0'" in result.err
    result = call("export", tmp_path, "--format", "ggfu", "--out", tmp_path / "out")
    assert result.code == 2 and "Did you mean 'gguf'" in result.err
    assert "q8_0" in call("export", "--help").out
    with pytest.raises(lora_jax.InputError, match="it is no decoder"):
        write_model(lora_jax.load_model(str(hub.bert)), tmp_path / "m.gguf")


def test_numbers_beyond_float16(source, tmp_path):
    model: Any = lora_jax.load_model(str(source))
    model.layers.segments[0].block.mlp.up_proj.kernel[...] *= 1e6
    with pytest.raises(lora_jax.InputError, match="ffn_up.weight' holds numbers that float16 cannot"):
        write_model(model, tmp_path / "m.gguf", dtype="float16")
