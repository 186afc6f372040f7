"""GGUF files written here, of every decoder family that llama.cpp has: read back here, and by transformers, on tiny random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import lora_jax
from lora_jax.errors import InputWarning
from lora_jax.interop.gguf.lora import write_adapter
from lora_jax.interop.gguf.model import write_model
from lora_jax.models.families import gguf_architectures
from lora_jax.models.tensors import base_tensors
from lora_jax.weights.gguf_header import dequantized, read_gguf, stored_rows
from lora_jax.weights.load import open_checkpoint
from tests import gguf_tokens, tiny
from tests.interop.zoo import VOCAB, Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# Files say nothing of how the scores of a Gemma are scaled: one size of model follows from the width of its heads.
CHANGED = {"gemma2": {"query_pre_attn_scalar": 16}}
WRITTEN = ["llama-gqa-bias", "llama-yarn", "mistral", "mistral-wide-heads", "qwen2", "qwen2-window", "qwen3", "granite", "gemma-mqa",
           "gemma2", "gemma3-scaled", "phi3-longrope", "olmo2", "smollm3", "gpt2", "gpt_neox"]  # fmt: skip
# transformers reads no Gemma 1, Granite, OLMo 2, SmolLM3 and GPT-NeoX in GGUF.
READ_BY_TRANSFORMERS = ["llama-gqa-bias", "qwen2", "gemma3-scaled", "phi3-longrope", "gpt2"]


def source(zoo: Zoo, name: str, folder: Path) -> Path:
    """The model's folder, with a tokenizer."""
    path = folder / name
    shutil.copytree(zoo.source(name), path)
    if name in CHANGED:
        config = transformers.AutoConfig.from_pretrained(path)
        config.update(CHANGED[name])
        config.save_pretrained(path)
    gguf_tokens.save(gguf_tokens.byte_level(size=VOCAB), path, eos_token="<|end|>")
    return path


@pytest.mark.parametrize("name", WRITTEN)
def test_every_tensor_and_the_shape_come_back(zoo: Zoo, name: str, tmp_path: Path):
    """To the bit, in float32: the file is read by the reader that reads llama.cpp's own."""
    model = lora_jax.load_model(str(source(zoo, name, tmp_path)))
    write_model(model, tmp_path / "m.gguf", dtype="float32")
    read = lora_jax.load_model(str(tmp_path / "m.gguf"))
    ours, theirs = base_tensors(model), base_tensors(read)
    assert ours.keys() == theirs.keys()
    for key in ours:
        # Gemma's norms are written with 1 added.
        np.testing.assert_allclose(theirs[key].read(), ours[key].read(), atol=1e-6 if "norm" in key else 0, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_logits_that_transformers_computes_from_the_file(zoo: Zoo, name: str, tmp_path: Path):
    """It is given the config: of the file it reads no bias of a Llama, no number of GPT-2's positions, no scale of a Gemma."""
    folder = source(zoo, name, tmp_path)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 24))
    with tiny.quick_compile():
        model = tiny.trained(lora_jax.load_model(str(folder)), targets="all-linear")
        expected = np.asarray(model(jnp.asarray(tokens, jnp.int32)))
    write_model(model, tmp_path / "m.gguf", dtype="float32")
    config = transformers.AutoConfig.from_pretrained(folder)
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_allclose(read.eval()(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "far"), [("float16", 1e-3), ("bfloat16", 8e-3), ("q8_0", 8e-3), ("q4_0", 0.15)])
def test_each_type_is_read_alike_by_transformers(zoo: Zoo, dtype: str, far: float, tmp_path: Path):
    folder = source(zoo, "llama-gqa-bias", tmp_path)
    model = lora_jax.load_model(str(folder))
    if dtype in ("q8_0", "q4_0"):
        with pytest.warns(InputWarning, match=f"down_proj.*{dtype}|ffn_down.*{dtype}"):  # its rows are of 48 numbers
            write_model(model, tmp_path / "m.gguf", dtype=dtype)
    else:
        write_model(model, tmp_path / "m.gguf", dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    theirs = {key: value.numpy() for key, value in read.state_dict().items()}
    ours = open_checkpoint(tmp_path / "m.gguf", architectures=gguf_architectures())
    plain = base_tensors(model)
    kinds = set()
    for name in ours.names():
        got, exact = ours.read(name), plain[name].read()
        np.testing.assert_array_equal(got, theirs[name], err_msg=name)
        assert np.abs(got - exact).max() <= far * np.abs(exact).max(), name
        kinds.add(bool((got == exact).all()))
    assert kinds == {True, False}  # biases and norms stay as they are


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-llama3", "gemma2", "gpt2-untied", "gpt_neox-serial", "mixtral", "smollm3-window"])
def test_what_such_files_cannot_say(zoo: Zoo, name: str, tmp_path: Path):
    folder = source(zoo, name, tmp_path)
    if name == "gemma2":
        config = transformers.AutoConfig.from_pretrained(folder)
        config.update({"query_pre_attn_scalar": 24})
        config.save_pretrained(folder)
    says = {
        "llama-dynamic": "no rotary scaling 'dynamic'",
        "llama-llama3": "not Llama 3's rotary scaling",
        "gemma2": r"block\.attention_scale is 0\.204.* 0\.25",
        "gpt2-untied": r"block\.(activation|attention_scale) is",
        "gpt_neox-serial": r"block\.activation is gelu_tanh, and they mean gelu",
        "mixtral": "'mixtral' models have no form in GGUF",
        "smollm3-window": r"layer_types\[0\]\.rotary",
    }
    with pytest.raises(lora_jax.InputError, match=says[name]):
        write_model(lora_jax.load_model(str(folder)), tmp_path / "m.gguf")


def raw(path: Path) -> dict[str, np.ndarray]:
    """The tensors as they lie in the file."""
    tensors = read_gguf(path).tensors
    return {name: dequantized(t, stored_rows(t, t.shape[0] if len(t.shape) > 1 else 1)).reshape(t.shape) for name, t in tensors.items()}


ADAPTER = {"rslora": True, "rank_pattern": {"down_proj": 2, "o_proj": 3}, "alpha_pattern": {"down_proj": 5.0}}
TOP = {"targets": "all-linear", "layers": "last:1"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama-gqa-bias", {"targets": ["q_proj", "k_proj", "o_proj", "down_proj", "embed", "lm_head"]}),
        ("qwen2", TOP),
        ("gpt2", TOP),
        ("gpt_neox", {"targets": ["qkv_proj", "o_proj", "down_proj"]}),
        ("phi3-longrope", TOP),
    ],
)
def test_an_adapter_file_gives_the_merged_file(zoo: Zoo, name: str, values: dict[str, Any], tmp_path: Path):
    """W + alpha / rank * B A, as llama.cpp computes it, tensor by tensor."""
    base = lora_jax.load_model(str(source(zoo, name, tmp_path)))
    model = tiny.trained(base, **values | ADAPTER)
    write_adapter(model, tmp_path / "a.gguf")
    write_model(base, tmp_path / "base.gguf", dtype="float32")
    write_model(model, tmp_path / "merged.gguf", dtype="float32")
    header = read_gguf(tmp_path / "a.gguf")
    assert [header.metadata[k] for k in ("general.type", "adapter.type")] == ["adapter", "lora"]
    assert header.metadata["general.architecture"] == read_gguf(tmp_path / "base.gguf").metadata["general.architecture"]
    factors, before, after = (raw(tmp_path / file) for file in ("a.gguf", "base.gguf", "merged.gguf"))
    changed = {key.removesuffix(".lora_a") for key in factors if key.endswith(".lora_a")}
    assert changed and {f"{key}.lora_{part}" for key in changed for part in "ab"} == factors.keys()
    for key, value in before.items():
        if key in changed:
            a, b = factors[f"{key}.lora_a"], factors[f"{key}.lora_b"]
            a = a.T if key == "token_embd.weight" else a  # whose rows are looked up
            change = b @ a if key != "token_embd.weight" else (b @ a).T
            value = value + header.metadata["adapter.lora.alpha"] / b.shape[1] * change
        np.testing.assert_allclose(after[key], value, atol=2e-6, err_msg=key)
    assert any(key.startswith("blk.0.") for key in changed) == (values is not TOP)
    assert {factors[k].shape[1] for k in factors if k.endswith("b")} == {2, 3, 4}
