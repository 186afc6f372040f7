"""BART (arXiv:1910.13461) and what is saved in its form: mBART (arXiv:2001.08210), Marian (opus-mt) and Pegasus (arXiv:1912.08777).

BART and Marian norm the sums, mBART and Pegasus the input of each branch. BART and mBART have learned positions (two rows of whose table
stand before the first) and a norm after the embeddings, Marian and Pegasus have sines and cosines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..encoder_decoder import EncoderDecoderConfig
from ..layers import BlockConfig
from .base import Family, Weight, activation, norms, projections, size, width_and_heads

ROOT = "model."
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}


def _block(hf: Mapping[str, Any], dtype: Any, half: str, norm_at: str) -> BlockConfig:
    width, heads = width_and_heads(hf, "d_model", f"{half}_attention_heads")
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=size(hf, f"{half}_ffn_dim"),
        activation=activation(hf, "activation_function", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,  # no part of the config
        norm_at=norm_at,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        cross=half == "decoder",
        dtype=dtype,
    )


def _config(hf: Mapping[str, Any], dtype: Any, *, normed: str, learned: bool, start: int | None) -> EncoderDecoderConfig:
    """The config of a model of BART's form.

    Args:
        normed: `BlockConfig.norm_at`; norms on the inputs have one more on each stack's output.
        learned: whether there are learned positions, and a norm of the embeddings.
        start: the family's default of the token before a target.
    """
    encoder, decoder = (_block(hf, dtype, half, normed) for half in ("encoder", "decoder"))
    longest = size(hf, "max_position_embeddings", 1024)
    before = hf.get("decoder_start_token_id", start)
    return EncoderDecoderConfig(
        encoder,
        decoder,
        encoder_depth=size(hf, "encoder_layers"),
        depth=size(hf, "decoder_layers"),
        vocab=size(hf, "vocab_size"),
        tied=True,
        start=None if before is None else size({"decoder_start_token_id": before}, "decoder_start_token_id", least=0),
        positions=longest + 2 if learned else 0,
        first_position=2 if learned else 0,
        sinusoidal=not learned,
        longest=longest,
        embed_scale=decoder.width**0.5 if hf.get("scale_embedding", False) else 1.0,
        embed_norm=learned,
        final_norm=normed == "input",
        logit_bias=True,
    )


def _weights(config: EncoderDecoderConfig) -> dict[str, Weight]:
    tables = [f"{ROOT}{half}.embed_tokens.weight" for half in ("decoder", "encoder")]
    own = ("lm_head.weight",) if config.tied else ()
    if config.source_vocab is None:
        table = {"embed.embedding": Weight(f"{ROOT}shared.weight", others=(*tables, *own))}
    else:
        table = {"source_embed.embedding": Weight(tables[1]), "embed.embedding": Weight(tables[0], others=own)}
    for half in ("encoder", "decoder"):
        layer = f"{ROOT}{half}.layers.{{i}}."
        branches = {"attn": "self_attn"} | ({"cross_attn": "encoder_attn"} if half == "decoder" else {})
        linears = {f"{half}.layers.{a}.{p}": f"{layer}{b}.{q}" for a, b in branches.items() for p, q in _ATTENTION.items()}
        linears |= {f"{half}.layers.mlp.up_proj": f"{layer}fc1", f"{half}.layers.mlp.down_proj": f"{layer}fc2"}
        names = {f"{half}.layers.{a}_norm": f"{layer}{b}_layer_norm" for a, b in branches.items()}
        names[f"{half}.layers.mlp_norm"] = f"{layer}final_layer_norm"
        if config.embed_norm:
            names[f"{half}.embed_norm"] = f"{ROOT}{half}.layernorm_embedding"
        if config.final_norm:
            names[f"{half}.final_norm"] = f"{ROOT}{half}.layer_norm"
        if config.positions:
            ours = "position_table" if config.sinusoidal else "position_embed.embedding"
            table[f"{half}.{ours}"] = Weight(f"{ROOT}{half}.embed_positions.weight")
        table |= projections(linears, bias=True) | norms(names)
    if config.logit_bias:
        table["logit_bias"] = Weight("final_logits_bias")
    return table if config.tied else table | projections({"lm_head": "lm_head"}, bias=False)


def _bart(hf: Mapping[str, Any], dtype: Any) -> EncoderDecoderConfig:
    return _config(hf, dtype, normed="residual", learned=True, start=2)


def _mbart(hf: Mapping[str, Any], dtype: Any) -> EncoderDecoderConfig:
    return _config(hf, dtype, normed="input", learned=True, start=None)


def _marian(hf: Mapping[str, Any], dtype: Any) -> EncoderDecoderConfig:
    """Some pairs of languages have a vocabulary each."""
    config = _config(hf, dtype, normed="residual", learned=False, start=58100)
    if hf.get("share_encoder_decoder_embeddings", True):
        return config
    return dataclasses.replace(config, source_vocab=config.vocab, vocab=size(hf, "decoder_vocab_size", config.vocab))


def _pegasus(hf: Mapping[str, Any], dtype: Any) -> EncoderDecoderConfig:
    return _config(hf, dtype, normed="input", learned=False, start=0)


def _family(config: Any, architecture: str, language_model: str = "") -> Family:
    return Family("encoder_decoder", config, _weights, architecture, language_model, root=ROOT, heads=lambda _: {})


FAMILIES.register("bart", _family(_bart, "Bart"))
FAMILIES.register("mbart", _family(_mbart, "MBart"))
FAMILIES.register("marian", _family(_marian, "Marian", "MarianMTModel"))
FAMILIES.register("pegasus", _family(_pegasus, "Pegasus"))
