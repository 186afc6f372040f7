"""Every decoder family from GGUF: the same parameters and options as from the Hugging Face folder that llama.cpp's converter read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save_file

from lora_jax.errors import InputError, InputWarning
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import find_family
from lora_jax.models.load import BaseFiles, load_model
from lora_jax.weights.load import open_checkpoint
from tests.gguf_files import write_gguf

SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5000.0}  # fmt: skip
BOTH = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}

CASES: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-yarn": SHAPE
    | {"model_type": "llama", "head_dim": 16, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": None},
    "granite": SHAPE
    | {"model_type": "granite", "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.22,
       "logits_scaling": 2.5, "attention_bias": True},
    "smollm3": SHAPE | {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
    "qwen2": SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False},
    "gemma": SHAPE | {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0},
    "gemma2": SHAPE
    | BOTH
    | {"model_type": "gemma2", "num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
    "gemma2-capless": SHAPE
    | BOTH
    | {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 16},
    "gemma3": SHAPE | BOTH | {"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_local_base_freq": 10000.0},
    "gemma3-scaled": SHAPE
    | BOTH
    | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 8.0},
    "phi3": SHAPE | {"model_type": "phi3", "sliding_window": 6, "original_max_position_embeddings": 64},
    "phi3-longrope": SHAPE
    | {"model_type": "phi3", "original_max_position_embeddings": 16, "sliding_window": None, "tie_word_embeddings": True,
       "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 5.1],
                        "partial_rotary_factor": 0.75}},
    "olmo2": SHAPE | {"model_type": "olmo2"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64,
             "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "gpt2-untied": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48,
                    "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                 "intermediate_size": 64, "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "rotary_pct": 0.5},
    "gpt_neox-serial": {"model_type": "gpt_neox", "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                        "intermediate_size": 64, "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "rotary_pct": 1.0,
                        "use_parallel_residual": False},
}  # fmt: skip


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a Hugging Face config, under the names and in the layout of its files."""
    family, draw = find_family(config, "test"), np.random.default_rng(seed)
    ours = family.config(config, jnp.dtype("float32"))
    model = nnx.eval_shape(lambda: Decoder(ours, rngs=nnx.Rngs(0)))
    table, found = family.weights(ours), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        weight = table[".".join(map(str, path)).replace("layers.segments.0.block.", "layers.")]
        inner = weight.oriented(variable.shape[weight.leading :])
        found |= {name: draw.normal(size=inner).astype(np.float32) for _, _, name in weight.tensors(variable.shape)}
    return found


def write_both(folder: Path, config: dict[str, Any], **options: Any) -> tuple[Path, Path]:
    """The model as a Hugging Face folder, and as a GGUF file."""
    tensors = tensors_of(config)
    hub, file = folder / "hub", folder / "model.gguf"
    hub.mkdir()
    save_file(tensors, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps(config))
    write_gguf(file, config, tensors, **options)
    return hub, file


def said(config: Any) -> str:
    """All of a config, numbers to the digits that float32 has: GGUF's settings have no more."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.6g}", repr(config))


def parameters(model: Any) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_is_the_model_that_was_converted(tmp_path, name):
    hub, file = write_both(tmp_path, CASES[name])
    theirs, ours = load_model(str(hub)), load_model(str(file))
    assert said(ours.config) == said(theirs.config)
    expected, got = parameters(theirs), parameters(ours)
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        if "norm" in path and name.startswith("gemma"):  # stored with 1 added, in float32
            np.testing.assert_allclose(got[path], array, atol=5e-7, err_msg=path)
        else:
            np.testing.assert_array_equal(got[path], array, err_msg=path)
    # Its config says the same again, to whoever reads it: an exported checkpoint has it.
    origin, kind = ours.origin, CASES[name]["model_type"]
    assert origin is not None and find_family(origin.config, "test").config(origin.config, jnp.dtype("float32")) == ours.config
    assert origin.model_type == ("llama" if kind == "mistral" else kind)  # a Mistral is a Llama in GGUF


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma3", "phi3"])
def test_slices_of_what_is_turned_equal_the_whole(tmp_path, name, monkeypatch):
    monkeypatch.setattr("lora_jax.weights.gguf._CHUNK", 100)  # a few rows at a time
    _, file = write_both(tmp_path, CASES[name])
    checkpoint = open_checkpoint_of(file)
    for tensor in checkpoint.names():
        whole = checkpoint.read(tensor)
        assert whole.shape == checkpoint.shape(tensor) and whole.flags["C_CONTIGUOUS"]
        for index in [(slice(3, 17),), (slice(None), slice(5, 9)), (slice(20, None), slice(None, 3)), (slice(6, 6),)]:
            index = index[: whole.ndim]
            np.testing.assert_array_equal(checkpoint.read_slice(tensor, index), whole[index], err_msg=tensor)


def open_checkpoint_of(file: Path) -> Any:
    from lora_jax.models.families import gguf_architectures

    return open_checkpoint(file, architectures=gguf_architectures())


@pytest.mark.parametrize("name", ["gpt2", "gemma", "llama", "phi3"])
def test_quantised_files_stay_near(tmp_path, name):
    """Each change of the converter is undone to dequantised values too: in another order errors would be of the size of the weights."""
    kinds = {"attn_q": Q.Q8_0, "attn_k": Q.Q5_1, "attn_qkv": Q.Q5_0, "attn_output": Q.Q8_0, "ffn_up": Q.Q8_0, "token_embd": Q.Q4_1}
    _, file = write_both(tmp_path, CASES[name], kinds=kinds)
    checkpoint, expected = open_checkpoint_of(file), tensors_of(CASES[name])
    moved = 0.0
    for tensor in checkpoint.names():
        error = float(np.abs(checkpoint.read(tensor) - expected[tensor]).max())
        assert error < 0.4, tensor
        moved = max(moved, error)
    assert moved > 0.01


def test_windows_and_their_rotary_base_follow_the_file(tmp_path):
    config = CASES["gemma3"] | {"layer_types": ["full_attention", *["sliding_attention"] * 6], "rope_local_base_freq": 250.0}
    pattern = {"gemma3.attention.sliding_window_pattern": [False, *[True] * 6], "gemma3.rope.freq_base_swa": 250.0}
    hub, file = write_both(tmp_path, config, extra=pattern)
    assert load_model(str(file)).config == load_model(str(hub)).config
    for period, types in ((2, "sf" * 3 + "s"), (0, "s" * 7), (1, "f" * 7)):
        write_gguf(file, config, tensors_of(config), extra={"gemma3.attention.sliding_window_pattern": period})
        assert "".join(t[0] for t in open_checkpoint_of(file).config["layer_types"]) == types
    write_gguf(file, config, tensors_of(config), extra={"gemma3.attention.sliding_window": 0})
    assert set(open_checkpoint_of(file).config["layer_types"]) == {"full_attention"}
    write_gguf(file, config, tensors_of(config), extra={"gemma3.attention.sliding_window_pattern": [True]})
    with pytest.raises(InputError, match=r"'gemma3\.attention\.sliding_window_pattern' is of 1 layers, and the model has 7"):
        open_checkpoint_of(file)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_the_width(tmp_path, name, layers):
    """Their converter says nothing of it: llama.cpp knows them by their depth."""
    config = CASES[name] | {"num_hidden_layers": layers, "vocab_size": 5, "intermediate_size": 8, "head_dim": 4}
    write_gguf(tmp_path / "m.gguf", config, tensors_of(config))
    assert open_checkpoint_of(tmp_path / "m.gguf").config["query_pre_attn_scalar"] == 32 // 4
    shallow = config | {"num_hidden_layers": layers - 1}
    write_gguf(tmp_path / "m.gguf", shallow, tensors_of(shallow))
    assert open_checkpoint_of(tmp_path / "m.gguf").config["query_pre_attn_scalar"] == 4


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("olmo2", {"olmo2.attention.sliding_window": 8}, r"OLMo 3\) is not supported"),
        ("granite", {"granite.rope.scaling.finetuned": False}, "Granite without rotary positions"),
        ("granite", {"granite.logit_scale": None}, "lacks 'granite.logit_scale'"),
        ("gemma2", {"gemma2.rope.freq_base_swa": 77.0}, r"freq_base_swa' = 77\.0 should be 5000\.0"),
        ("qwen3", {"qwen3.attention.value_length": 8}, "'qwen3.attention.value_length' = 8 should be the keys' size, 16"),
        ("qwen2", {"qwen2.attention.causal": False}, "'qwen2.attention.causal' is false"),
        ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "'longrope' needs the tensors rope_factors_short.weight and rope_factors_long"),
        ("phi3-longrope", {"phi3.rope.scaling.type": "linear"}, "'linear' beside the tensor rope_factors_short.weight is not supported"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}, "lacks 'gpt2.attention.layer_norm_epsilon'"),
        ("gpt2", {"gpt2.rope.freq_base": 10000.0}, "rotary setting 'gpt2.rope.freq_base' is not supported"),
        ("gpt_neox", {"gptneox.rope.dimension_count": 9}, "'gptneox.rope.dimension_count' = 9 should be the heads' size, 8"),
        ("llama", {"llama.rope.freq_base_swa": 5.0}, "rotary setting 'llama.rope.freq_base_swa' is not supported"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(tmp_path, name, extra, said):
    write_gguf(tmp_path / "m.gguf", CASES[name], tensors_of(CASES[name]), extra=extra)
    with pytest.raises(InputError, match=rf"m\.gguf: .*{said}"):
        open_checkpoint_of(tmp_path / "m.gguf")


def test_other_settings_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", CASES["qwen2"], tensors_of(CASES["qwen2"]), extra={"qwen2.attention.clamp_kqv": 8.0})
    with pytest.warns(InputWarning, match=r"left out: qwen2\.attention\.clamp_kqv"):
        BaseFiles(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["m.gguf.part00", "m.gguf.part1of2", "m.gguf-split-a"])
def test_pieces_of_a_file_are_to_be_joined_first(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=rf"{name} is one piece of a file .* cat m\.gguf[.-](part|split)\* > m\.gguf"):
            open_checkpoint(source)


def test_gguf_files_of_the_hub_are_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_jax.weights.load.resolve", lambda *_, **__: tmp_path)
    with pytest.raises(InputError, match=r"no \.gguf file\. GGUF files of the hub are not fetched: hf download org/name NAME\.gguf"):
        open_checkpoint("hf://org/name")
