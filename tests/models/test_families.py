"""Families' configs: what older files call things, and what is refused, by name. Their numbers are compared in `tests/interop/`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from lora_jax.config.doors import FAMILIES
from lora_jax.errors import InputError
from lora_jax.models.families import find_family, gguf_architectures
from lora_jax.models.layers import LayerType
from lora_jax.models.positions import Rotary

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def config_of(family: str, **options: Any) -> Any:
    return FAMILIES.all()[family].config(SHAPE | options, jnp.dtype("float32"))


GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
BOTH = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            "llama",
            {"rope_theta": 10.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}},
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "yarn", **LONG}, "original_max_position_embeddings": 16},
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16, **LONG}},
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 100},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100, "partial_rotary_factor": 0.5}},
        ),
        (
            "gemma3_text",
            {"rope_theta": 1e5, "rope_local_base_freq": 10.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                }
            },
        ),
        ("gemma3_text", {"sliding_window_pattern": 2}, {"layer_types": ["sliding_attention", "full_attention"]}),
        (
            "modernbert",
            {"global_rope_theta": 50.0, "local_rope_theta": 10.0, "global_attn_every_n_layers": 2},
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                },
            },
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0},
            {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
        ),
    ],
)
def test_older_configs_mean_the_same(family: str, old: dict[str, Any], new: dict[str, Any]):
    assert config_of(family, **old) == config_of(family, **new) != config_of(family)


def test_the_first_gemmas_gelu_is_its_approximation():
    assert config_of("gemma", hidden_act="gelu").block.activation == "gelu_tanh"


def test_a_window_that_is_not_used_is_none():
    assert config_of("qwen2", sliding_window=8).layer_types == (LayerType(rotary=Rotary(8)),) * 2
    assert config_of("mistral", sliding_window=None).layer_types == (LayerType(rotary=Rotary(8)),)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "rope_type 'yarm' is not supported. Did you mean 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported (only 'gelu'"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0 should be a whole number, 1 or more"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types = 'full_attention' is not supported"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, and num_hidden_layers = 2"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types = 'chunked_attention' is not supported (only 'full_attention'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers names 1 layers, and num_hidden_layers = 2"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ("gpt2", GPT2 | {"n_head": 5}, "n_head = 5 does not divide n_embd = 32"),
        ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 32"),
        ("modernbert", {"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 32"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 32"),
        ("bert", {"hidden_size": "32"}, "hidden_size = '32' should be a whole number, 1 or more"),
        ("roberta", {"vocab_size": 0}, "vocab_size = 0 should be a whole number, 1 or more"),
        ("distilbert", {"dim": 32, "n_heads": 5, "hidden_dim": 64}, "n_heads = 5 does not divide dim = 32"),
        ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size = 4 is not supported (only odd numbers, and 0)"),
        ("deberta-v2", {"conv_groups": 2}, "conv_groups = 2 is not supported"),
        ("deberta-v2", {"embedding_size": 16}, "embedding_size = 16 is not supported (only 32)"),
        (
            "deberta-v2",
            {"relative_attention": True, "pos_att_type": "c2p|p2p"},
            "pos_att_type = 'p2p' is not supported (only 'c2p', 'p2c')",
        ),
        ("deberta-v2", {"relative_attention": True}, "pos_att_type names neither c2p nor p2c"),
        ("deberta-v2", BOTH | {"position_buckets": 126}, "position_buckets = 126 does not fit max_relative_positions = 64"),
        ("modernbert", {"local_attention": 0}, "local_attention = 0 should be a whole number, 1 or more"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", **LONG, "long_factor": [2.0]}}, "should have 4 numbers each"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok = 3, and there are 2 experts"),
    ],
)
def test_what_is_not_supported_is_named(family: str, options: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        config_of(family, **options)
    assert message in str(error.value)


def test_an_unknown_family_lists_the_known():
    with pytest.raises(InputError) as error:
        find_family({"model_type": "gemma3"}, "model.source: here")
    message = str(error.value)
    assert "'gemma3' is not supported. Did you mean" in message
    assert message.endswith(f"Known: {', '.join(sorted(FAMILIES))}.") and "gemma3_text" in message


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("bert", "classification", "BertForSequenceClassification"),
        ("xlm-roberta", None, "XLMRobertaModel"),
        ("gpt2", None, "GPT2LMHeadModel"),
        ("gpt2", "token_classification", "GPT2ForTokenClassification"),
        ("gemma3_text", None, "Gemma3ForCausalLM"),
        ("smollm3", "question_answering", "SmolLM3ForQuestionAnswering"),
    ],
)
def test_the_names_of_transformers_classes(family: str, head: str | None, name: str):
    """All are compared with transformers' own in `tests/interop/test_export.py`."""
    assert FAMILIES.get(family, "model_type").class_name(head) == name


def test_families_read_from_gguf_are_families():
    found = gguf_architectures()
    assert {"llama", "qwen2", "qwen3"} <= set(found)
    assert all(FAMILIES.get(one.model_type, "model_type").gguf is one for one in found.values())
