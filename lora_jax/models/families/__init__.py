"""One small file a family: how its Hugging Face config and weight names translate. No family has code of its own in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...config.errors import InputError, hint
from ..head_shape import HeadShape
from ..layers import BlockConfig
from .weight import Head, Weight


def decoder_heads(*, tokens: str = "score", renamed: tuple[str, str] | None = None) -> Callable[[Mapping[str, Any]], dict[str, Head]]:
    """The heads that transformers gives decoders: one linear layer, on the last token for the class of a text.

    Args:
        tokens: what the layer is called where it classifies each token.
        renamed: see `Head`, of question answering.
    """
    heads = {
        "classification": Head(HeadShape("last", bias=False), {"classifier": "score"}),
        "token_classification": Head(HeadShape("each"), {"classifier": tokens}),
        "question_answering": Head(HeadShape("each"), {"classifier": "qa_outputs"}, renamed=renamed),
    }
    return lambda _: heads


_DECODER_HEADS = decoder_heads()


def encoder_heads(classification: Head) -> dict[str, Head]:
    """The heads of most encoders: one linear layer on each token, and for the class of a text what each has of its own."""
    return {
        "classification": classification,
        "token_classification": Head(HeadShape("each"), {"classifier": "classifier"}),
        "question_answering": Head(HeadShape("each"), {"classifier": "qa_outputs"}),
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`.

    Attributes:
        kind: `encoder` or `decoder`.
        config: Hugging Face config and dtype -> `EncoderConfig` or `DecoderConfig`.
        weights: our config -> {parameter path: Weight}. In a path `layers.` stands for the stack.
        prefixes: what may stand before the names in a checkpoint (`bert.` where it was saved with a head).
        root: what all names but those of output heads start with, unless a checkpoint was saved without any head (`model.`).
        heads: Hugging Face config -> {kind of head: Head}.
    """

    kind: str
    config: Callable[[Mapping[str, Any], Any], Any]
    weights: Callable[[Any], dict[str, Weight]]
    prefixes: tuple[str, ...] = ("",)
    root: str = ""
    heads: Callable[[Mapping[str, Any]], dict[str, Head]] = _DECODER_HEADS


def families() -> dict[str, Family]:
    """`model_type` -> family, of all that are known."""
    from . import (
        bert,
        deberta,
        distilbert,
        gemma,
        gpt2,
        gpt_neox,
        granite,
        llama,
        mistral,
        mixtral,
        modernbert,
        olmo2,
        phi3,
        qwen,
        roberta,
        smollm3,
    )  # fmt: skip

    return {
        "bert": bert.FAMILY,
        "distilbert": distilbert.FAMILY,
        **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), roberta.FAMILY),  # with vocabularies of their own
        "deberta-v2": deberta.FAMILY,  # v3 is saved as this too
        "modernbert": modernbert.FAMILY,
        "llama": llama.FAMILY,
        "mistral": mistral.FAMILY,
        "mixtral": mixtral.FAMILY,
        "qwen2": qwen.QWEN2,
        "qwen3": qwen.QWEN3,
        "qwen3_moe": qwen.QWEN3_MOE,
        "smollm3": smollm3.FAMILY,
        "granite": granite.FAMILY,
        "gemma": gemma.GEMMA,
        "gemma2": gemma.GEMMA2,
        "gemma3_text": gemma.GEMMA3,
        "olmo2": olmo2.FAMILY,
        "phi3": phi3.FAMILY,
        "gpt2": gpt2.FAMILY,
        "gpt_neox": gpt_neox.FAMILY,
    }


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a Hugging Face config; `InputError` lists the known ones."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families():
        raise InputError(f"{where}: model_type '{kind}' is not supported. {hint(str(kind), families())} Known: {', '.join(families())}.")
    return families()[kind]


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`; `InputError` where it is missing."""
    if config.get(key) is None:
        raise InputError(f"config.json: no '{key}'.")
    return config[key]


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """`config[key]`, a whole number, `least` or more; `InputError` where it is something else, or missing without a `default`."""
    value = config.get(key)
    if value is None:
        value = required(config, key) if default is None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"config.json: {key} = {value!r} should be a whole number, {least} or more.")
    return value


def width_and_heads(config: Mapping[str, Any], width: str = "hidden_size", heads: str = "num_attention_heads") -> tuple[int, int]:
    """The sizes at these two keys, for attention whose heads share the width evenly; `InputError` where they do not."""
    whole, parts = size(config, width), size(config, heads)
    if whole % parts:
        raise InputError(f"config.json: {heads} = {parts} does not divide {width} = {whole}.")
    return whole, parts


# Hugging Face's name of an activation -> ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
}


def activation(config: Mapping[str, Any], key: str, default: str) -> str:
    """Our name of the activation that `config[key]` names; `InputError` where there is no such."""
    only(config, key, *_ACTIVATIONS)
    return _ACTIVATIONS[config.get(key, default)]


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """`InputError` where `config` has `key` with a value that is not supported."""
    if key in config and config[key] not in allowed:
        raise InputError(f"config.json: {key} = {config[key]!r} is not supported (only {', '.join(map(repr, allowed))}).")


def post_norm_block(width: int, heads: int, hidden: int, act: str, norm_eps: float, dtype: Any) -> BlockConfig:
    """The layer that BERT and its descendants share: norms after the sums, biases everywhere, a plain MLP.

    Args:
        act: Hugging Face's name of the activation.
    """
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=hidden,
        activation=activation({"hidden_act": act}, "hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=norm_eps,
        norm_at="residual",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        dtype=dtype,
    )


def norms(names: Mapping[str, str], *, bias: bool = True, first: int = 0) -> dict[str, Weight]:
    """Scale and bias of layer norms: our module path -> Hugging Face module path. `first` is that of `Weight`."""
    table = {f"{ours}.scale": Weight(f"{theirs}.weight", first=first) for ours, theirs in names.items()}
    return table | {f"{ours}.bias": Weight(f"{theirs}.bias", first=first) for ours, theirs in names.items() if bias}


def embeddings(names: Mapping[str, str]) -> dict[str, Weight]:
    """Tables of vectors: our module path -> Hugging Face module path."""
    return {f"{ours}.embedding": Weight(f"{theirs}.weight") for ours, theirs in names.items()}


def projections(names: Mapping[str, str], *, bias: bool, transpose: bool = True) -> dict[str, Weight]:
    """Kernel (transposed, as `nn.Linear` has it) and bias of linear layers: our module path -> Hugging Face module path."""
    table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose) for ours, theirs in names.items()}
    if bias:
        table |= {f"{ours}.bias": Weight(f"{theirs}.bias") for ours, theirs in names.items()}
    return table
