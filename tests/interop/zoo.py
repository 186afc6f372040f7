"""Tiny random Hugging Face models, at least two a family, that between them use every option the family has.

`ZOO` names them; the fixture `zoo` (in `conftest.py`) gives the folder that transformers saved one to, and the model itself. Width
32, two to four layers, 128 tokens; every parameter is drawn, biases and norms too, and large enough that a wrong one shows.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

VOCAB = 128
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        family: Hugging Face's `model_type`.
        options: keyword arguments of its config class.
        head: the auto class that makes it.
    """

    family: str
    options: dict[str, Any]
    head: str = "AutoModelForCausalLM"


def _decoder(family: str, *, head: str = "AutoModelForCausalLM", **options: Any) -> Entry:
    return Entry(family, {**_COMMON, **_SHAPE, "num_key_value_heads": 4, "max_position_embeddings": 64, **options}, head)


def _encoder(family: str, *, head: str = "AutoModel", **options: Any) -> Entry:
    return Entry(family, {**_COMMON, **_SHAPE, "max_position_embeddings": 64, **options}, head)


def _seq2seq(family: str, **options: Any) -> Entry:
    halves = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    t5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    shape = {"d_model": 32, **(t5 if family in ("t5", "mt5") else {**halves, "max_position_embeddings": 64})}
    return Entry(family, {**_COMMON, **shape, **options}, "AutoModelForSeq2SeqLM")


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


# Positions in 8 buckets to each side, none added to the embedding.
_DEBERTA_V3: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": 16,
    "position_biased_input": False,
}

ZOO: dict[str, Entry] = {
    # Llama: multi-head and tied; grouped with biases; every way to stretch rotary positions, beyond the trained context too.
    "llama-mha-tied": _decoder("llama", tie_word_embeddings=True, num_key_value_heads=4),
    "llama-gqa-bias": _decoder("llama", num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-linear": _decoder("llama", num_key_value_heads=1, **_rope("linear", factor=4.0)),
    "llama-dynamic": _decoder("llama", **_rope("dynamic", factor=4.0), max_position_embeddings=16),
    "llama-yarn": _decoder("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=16), head_dim=16),
    "llama-llama3": _decoder(
        "llama",
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=500.0),
        head_dim=16,
    ),
    # Mistral.
    "mistral": _decoder("mistral", num_key_value_heads=2, sliding_window=6),
    "mistral-wide-heads": _decoder("mistral", num_key_value_heads=1, head_dim=12, sliding_window=None, tie_word_embeddings=True),
    # Qwen.
    "qwen2": _decoder("qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-window": _decoder("qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _decoder("qwen3", num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "qwen3-window": _decoder(
        "qwen3",
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        **_rope("yarn", factor=2.0, original_max_position_embeddings=32),
    ),
    # SmolLM3: some layers have no rotary positions.
    "smollm3": _decoder("smollm3", num_hidden_layers=4, num_key_value_heads=2, tie_word_embeddings=True),
    "smollm3-window": _decoder(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    # Granite: multipliers.
    "granite": _decoder(
        "granite",
        num_key_value_heads=2,
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        tie_word_embeddings=True,
    ),
    "granite-bias": _decoder("granite", attention_bias=True, mlp_bias=True, attention_multiplier=0.35, residual_multiplier=1.5),
    # Gemma.
    "gemma-mqa": _decoder("gemma", num_key_value_heads=1, head_dim=16),
    "gemma-untied": _decoder("gemma", num_key_value_heads=4, head_dim=8, attention_bias=True, hidden_act="gelu", tie_word_embeddings=False),
    "gemma2": _decoder(
        "gemma2",
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        num_hidden_layers=3,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
    ),
    "gemma2-uncapped": _decoder(
        "gemma2",
        num_key_value_heads=4,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma3": _decoder("gemma3_text", num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=24, sliding_window=5, num_hidden_layers=6),
    "gemma3-scaled": _decoder(
        "gemma3_text",
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=8.0,
        tie_word_embeddings=False,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # OLMo 2.
    "olmo2": _decoder("olmo2", num_key_value_heads=4),
    "olmo2-gqa": _decoder("olmo2", num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, **_rope("linear", factor=2.0)),
    # Phi-3: longrope, below and beyond the trained context.
    "phi3": _decoder("phi3", num_key_value_heads=4, sliding_window=6, original_max_position_embeddings=64),
    "phi3-longrope": _decoder(
        "phi3",
        num_key_value_heads=2,
        original_max_position_embeddings=16,
        tie_word_embeddings=True,
        **_rope("longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.0, 5.0], partial_rotary_factor=0.75),
    ),
    "phi3-shortrope": _decoder(
        "phi3",
        num_key_value_heads=1,
        original_max_position_embeddings=32,
        **_rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.0, 2.0, 5.0, 9.0], partial_rotary_factor=1.0),
    ),
    # GPT-2.
    "gpt2": _decoder("gpt2"),
    "gpt2-untied": _decoder(
        "gpt2",
        n_inner=48,
        activation_function="relu",
        scale_attn_weights=False,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
    # GPT-NeoX, and Pythia.
    "gpt_neox": _decoder("gpt_neox"),
    "gpt_neox-serial": _decoder(
        "gpt_neox",
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        **_rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    # Mixtures of experts.
    "mixtral": _decoder("mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window": _decoder(
        "mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=5, head_dim=12, tie_word_embeddings=True
    ),
    "qwen3_moe": _decoder("qwen3_moe", num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16),
    "qwen3_moe-normed": _decoder(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        norm_topk_prob=True,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
    ),
    # BERT.
    "bert": _encoder("bert"),
    "bert-gelu-new": _encoder("bert", hidden_act="gelu_new", type_vocab_size=3),
    # RoBERTa and its kin: positions counted from the padding's id on.
    "roberta": _encoder("roberta", type_vocab_size=1, pad_token_id=1, bos_token_id=0),
    "xlm-roberta": _encoder("xlm-roberta", num_hidden_layers=3, hidden_act="relu", layer_norm_eps=1e-5),
    # DistilBERT.
    "distilbert": _encoder("distilbert", hidden_dim=48),
    "distilbert-relu": _encoder("distilbert", hidden_dim=64, activation="relu", n_layers=3),
    # ModernBERT: a window of 4 to each side, one layer in three without; no biases; then all of them, another pattern, scaled positions.
    "modernbert": _encoder("modernbert", num_hidden_layers=4, local_attention=8),
    "modernbert-biases": _encoder(
        "modernbert",
        num_hidden_layers=3,
        hidden_activation="relu",
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        local_attention=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # DeBERTa-v3: shared projections, buckets, a normed table; v2: own projections, a convolution; one kind of scores; none at all.
    "deberta-v3": _encoder("deberta-v2", **_DEBERTA_V3, pos_att_type="p2c|c2p", share_att_key=True, norm_rel_ebd="layer_norm"),
    "deberta-v2": _encoder(
        "deberta-v2",
        **_DEBERTA_V3,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="none",
        type_vocab_size=2,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "deberta-c2p": _encoder("deberta-v2", relative_attention=True, pos_att_type=["c2p"], max_relative_positions=5),
    "deberta-p2c": _encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c"], share_att_key=True, hidden_act="relu"),
    "deberta-absolute": _encoder("deberta-v2", pos_att_type=["c2p"], type_vocab_size=3),
    # Encoder-decoders. T5: tied and scaled; 1.1, gated, with a projection of its own, stacks of unequal depth, few buckets.
    "t5": _seq2seq("t5"),
    "t5-gated": _seq2seq(
        "t5",
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        num_layers=3,
        num_decoder_layers=2,
        d_kv=12,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        layer_norm_epsilon=1e-4,
    ),
    "mt5": _seq2seq("mt5", feed_forward_proj="gated-silu", num_layers=3, num_decoder_layers=1),
    "bart": _seq2seq("bart", pad_token_id=1, bos_token_id=0, decoder_layers=3, encoder_ffn_dim=40),
    "bart-scaled": _seq2seq("bart", scale_embedding=True, activation_function="gelu_new", forced_bos_token_id=5, decoder_attention_heads=2),
    "mbart": _seq2seq("mbart", decoder_start_token_id=7, activation_function="relu"),
    "mbart-scaled": _seq2seq("mbart", decoder_start_token_id=2, forced_bos_token_id=9, scale_embedding=True, encoder_layers=3),
    "marian": _seq2seq("marian", decoder_start_token_id=0, forced_eos_token_id=2, scale_embedding=True, activation_function="swish"),
    "marian-two-vocabularies": _seq2seq(
        "marian", decoder_start_token_id=0, forced_eos_token_id=2, share_encoder_decoder_embeddings=False, decoder_vocab_size=96
    ),
    "pegasus": _seq2seq("pegasus", decoder_start_token_id=0, forced_eos_token_id=2),
    "pegasus-relu": _seq2seq(
        "pegasus", decoder_start_token_id=0, activation_function="relu", forced_eos_token_id=None, decoder_layers=1, scale_embedding=True
    ),
    # The same with heads.
    "bert-classes": _encoder("bert", head="AutoModelForSequenceClassification", num_labels=3),
    "bert-tags": _encoder("bert", head="AutoModelForTokenClassification", num_labels=5),
    "bert-answers": _encoder("bert", head="AutoModelForQuestionAnswering"),
    "roberta-classes": _encoder("roberta", head="AutoModelForSequenceClassification", pad_token_id=1, bos_token_id=0, num_labels=4),
    "camembert-tags": _encoder("camembert", head="AutoModelForTokenClassification", pad_token_id=1, bos_token_id=0, num_labels=3),
    "xlm-roberta-answers": _encoder("xlm-roberta", head="AutoModelForQuestionAnswering"),
    "distilbert-classes": _encoder("distilbert", head="AutoModelForSequenceClassification", hidden_dim=48, num_labels=2),
    "distilbert-tags": _encoder("distilbert", head="AutoModelForTokenClassification", hidden_dim=48, num_labels=3),
    "distilbert-answers": _encoder("distilbert", head="AutoModelForQuestionAnswering", hidden_dim=48),
    "modernbert-classes": _encoder("modernbert", head="AutoModelForSequenceClassification", local_attention=8, num_labels=3),
    "modernbert-means": _encoder(
        "modernbert",
        head="AutoModelForSequenceClassification",
        classifier_pooling="mean",
        classifier_bias=True,
        norm_bias=True,
        classifier_activation="silu",
    ),
    "modernbert-tags": _encoder("modernbert", head="AutoModelForTokenClassification", num_labels=5),
    "modernbert-answers": _encoder("modernbert", head="AutoModelForQuestionAnswering", local_attention=8),
    "deberta-classes": _encoder(
        "deberta-v2", head="AutoModelForSequenceClassification", **_DEBERTA_V3, pos_att_type="p2c|c2p", share_att_key=True, num_labels=3
    ),
    "deberta-tags": _encoder("deberta-v2", head="AutoModelForTokenClassification", pooler_hidden_act="tanh", num_labels=4),
    "deberta-answers": _encoder("deberta-v2", head="AutoModelForQuestionAnswering", **_DEBERTA_V3, pos_att_type=["p2c"]),
    "llama-classes": _decoder("llama", head="AutoModelForSequenceClassification", num_key_value_heads=2, num_labels=3),
    "llama-tags": _decoder("llama", head="AutoModelForTokenClassification", tie_word_embeddings=True, num_labels=5),
    "llama-answers": _decoder("llama", head="AutoModelForQuestionAnswering"),
    "qwen2-answers": _decoder("qwen2", head="AutoModelForQuestionAnswering"),
    "mistral-answers": _decoder("mistral", head="AutoModelForQuestionAnswering", sliding_window=6),
    "gemma2-tags": _decoder("gemma2", head="AutoModelForTokenClassification", head_dim=8, num_labels=4),
    "phi3-classes": _decoder("phi3", head="AutoModelForSequenceClassification", num_labels=4),
    "gpt2-classes": _decoder("gpt2", head="AutoModelForSequenceClassification", num_labels=3),
    "gpt2-tags": _decoder("gpt2", head="AutoModelForTokenClassification", num_labels=3),
    "gpt_neox-answers": _decoder("gpt_neox", head="AutoModelForQuestionAnswering"),
}


class Zoo:
    """The models of `ZOO`, each made when first asked for.

    Args:
        folder: where they are saved.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def source(self, name: str) -> Path:
        """The folder that `save_pretrained` wrote."""
        import torch
        import transformers

        folder = self._folder / name
        if folder.exists():
            return folder
        entry = ZOO[name]
        config = transformers.AutoConfig.for_model(entry.family, **entry.options)
        torch.manual_seed(zlib.crc32(name.encode()))
        model = getattr(transformers, entry.head).from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if not parameter.requires_grad:  # sines and cosines
                    continue
                parameter.normal_()
                if "norm" in path.lower() or path.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                    parameter.mul_(0.2).add_(0.0 if path.endswith("bias") else 1.0)
                elif parameter.ndim == 1:
                    parameter.mul_(0.3)
                elif not any(word in path.lower() for word in ("embed", "shared")):  # Conv1D's are square or (in, out): near enough
                    parameter.mul_(parameter.shape[-1] ** -0.5)
            for path, buffer in model.named_buffers():
                if path == "final_logits_bias":
                    buffer.normal_().mul_(0.3)
            if entry.options.get("tie_word_embeddings") is False and hasattr(model, "shared"):
                # transformers ties a T5's projection unless its file holds another.
                model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.save_pretrained(folder)
        return folder

    def model(self, name: str) -> Any:
        """The PyTorch model, loaded from its folder: float32, no dropout, attention written out."""
        import torch
        import transformers

        make = getattr(transformers, ZOO[name].head)
        return make.from_pretrained(self.source(name), attn_implementation="eager", dtype=torch.float32).eval()
