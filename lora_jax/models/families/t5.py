"""T5 (arXiv:1910.10683), T5 1.1, FLAN-T5 and mT5: RMS norms on each branch's input, no biases, unscaled scores, buckets of distances.

T5 1.1 and what follows it have a gated MLP, and a projection to the vocabulary of their own where the file holds one; the first T5 has
the embedding's, and scales what it projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..encoder_decoder import EncoderDecoderConfig
from ..layers import BlockConfig
from .base import Family, Weight, activation, norms, projections, size

# Of each stack, the sub-layers of a block in their order.
_LAYERS = {
    "encoder": {"attn": "SelfAttention", "mlp": "DenseReluDense"},
    "decoder": {"attn": "SelfAttention", "cross_attn": "EncDecAttention", "mlp": "DenseReluDense"},
}


def _block(hf: Mapping[str, Any], dtype: Any, feed_forward: str, *, cross: bool) -> BlockConfig:
    *gate, act = hf.get("feed_forward_proj", feed_forward).split("-")
    if gate not in ([], ["gated"]):
        raise InputError(f"config.json: feed_forward_proj = {hf['feed_forward_proj']!r} is not supported (only ACT and gated-ACT).")
    heads = size(hf, "num_heads")
    return BlockConfig(
        width=size(hf, "d_model"),
        heads=heads,
        kv_heads=heads,
        head_dim=size(hf, "d_kv"),
        hidden=size(hf, "d_ff"),
        activation=activation({"feed_forward_proj": "gelu_new" if gate and act == "gelu" else act}, "feed_forward_proj", "relu"),
        gated=bool(gate),
        norm="rms",
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        attention_scale=1.0,
        cross=cross,
        dtype=dtype,
    )


def _config(hf: Mapping[str, Any], dtype: Any, *, feed_forward: str = "relu", scaled: bool | None = None) -> EncoderDecoderConfig:
    encoder, decoder = (_block(hf, dtype, feed_forward, cross=cross) for cross in (False, True))
    count, longest = size(hf, "relative_attention_num_buckets", 32, least=4), size(hf, "relative_attention_max_distance", 128, least=2)
    if longest <= count // 2:
        raise InputError(f"config.json: relative_attention_max_distance = {longest} does not fit {count} buckets.")
    # `tie_word_embeddings: false` has always meant that nothing is scaled; newer files say it in a word of its own.
    if scaled is None:
        scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    depth = size(hf, "num_layers")
    return EncoderDecoderConfig(
        encoder,
        decoder,
        encoder_depth=depth,
        depth=size(hf, "num_decoder_layers", depth),
        vocab=size(hf, "vocab_size"),
        tied=True,  # but where the file holds another projection
        start=size(hf, "decoder_start_token_id", size(hf, "pad_token_id", 0, least=0), least=0),
        buckets=(count, longest),
        final_norm=True,
        logit_scale=size(hf, "d_model") ** -0.5 if scaled else 1.0,
    )


def _weights(config: EncoderDecoderConfig) -> dict[str, Weight]:
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if config.tied else ()))
    table = {"embed.embedding": Weight("shared.weight", others=copies)}
    mlp = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"} if config.block.gated else {"up_proj": "wi", "down_proj": "wo"}
    for half, branches in _LAYERS.items():
        linears, names = {}, {}
        for number, (ours, theirs) in enumerate(branches.items()):
            layer = f"{half}.block.{{i}}.layer.{number}."
            own = mlp if ours == "mlp" else {f"{p}_proj": p for p in "qkvo"}
            linears |= {f"{half}.layers.{ours}.{a}": f"{layer}{theirs}.{b}" for a, b in own.items()}
            names[f"{half}.layers.{ours}_norm"] = f"{layer}layer_norm"
        table |= projections(linears, bias=False) | norms(names, bias=False)
        table[f"{half}.distance_embed"] = Weight(f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        table |= norms({f"{half}.final_norm": f"{half}.final_layer_norm"}, bias=False)
    return table if config.tied else table | projections({"lm_head": "lm_head"}, bias=False)


def _mt5(hf: Mapping[str, Any], dtype: Any) -> EncoderDecoderConfig:
    return _config(hf, dtype, feed_forward="gated-gelu", scaled=False)


FAMILIES.register("t5", Family("encoder_decoder", _config, _weights, architecture="T5", heads=lambda _: {}))
FAMILIES.register("mt5", Family("encoder_decoder", _mt5, _weights, architecture="MT5", heads=lambda _: {}))
