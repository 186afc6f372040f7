"""Mistral (arXiv:2310.06825): Llama with a sliding window in every layer.

Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in the MLP's place; and how files hold such mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..decoder import DecoderConfig
from ..layers import LayerType
from .base import Family, Weight, only, size
from .llama import GGUF_LLAMA, LAYER, ROOT, block, decoder, full_rotary, weights, window


def experts(hf: Mapping[str, Any], key: str, *, usual: int, used: int, hidden: int) -> dict[str, int]:
    """A block's options: how many experts `key` says there are, how many a token uses, how wide their hidden layers are.

    Args:
        usual, used: the family's defaults.
    """
    count = size(hf, "num_local_experts", size(hf, key, usual))
    each = size(hf, "num_experts_per_tok", used)
    if each > count:
        raise InputError(f"config.json: num_experts_per_tok = {each}, and there are {count} experts.")
    return {"experts": count, "experts_used": each, "hidden": hidden}


def expert_weights(module: str, names: tuple[str, str, str]) -> dict[str, Weight]:
    """A router and its experts: in files a tensor an expert, in transformers' module (and files of its making) one for all.

    Args:
        module: what stands in the MLP's place in a layer.
        names: an expert's gate, up and down projections.
    """
    called, (gate, up, down) = LAYER + "mlp.", (f"{LAYER}{module}.experts.{{e}}.{name}.weight" for name in names)
    return {
        "layers.mlp.router.kernel": Weight(f"{LAYER}{module}.gate.weight", transpose=True, called=called + "gate.weight"),
        "layers.mlp.experts.gate_up_proj.kernel": Weight(gate, True, (up,), called + "experts.gate_up_proj"),
        "layers.mlp.experts.down_proj.kernel": Weight(down, True, called=called + "experts.down_proj"),
    }


def _mistral(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    for kind in hf.get("layer_types") or ():
        only({"layer_types": kind}, "layer_types", "sliding_attention")  # with others it is a Ministral
    layer = block(hf, dtype, qkv_bias=False, out_bias=False, mlp_bias=False)
    return decoder(hf, layer, [LayerType(window(hf, 4096), full_rotary(hf, layer))])


def _mixtral(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    chosen = experts(hf, "num_local_experts", usual=8, used=2, hidden=size(hf, "intermediate_size"))
    eps = hf.get("rms_norm_eps", 1e-5)
    layer = block(hf, dtype, norm_eps=eps, qkv_bias=False, out_bias=False, mlp_bias=False, **chosen)
    return decoder(hf, layer, [LayerType(window(hf, None), full_rotary(hf, layer, theta=1000000.0))])


def _mixtral_weights(config: DecoderConfig) -> dict[str, Weight]:
    return weights(config) | expert_weights("block_sparse_moe", ("w1", "w3", "w2"))


# llama.cpp knows no Mistral: such files say that they are Llamas, and its windows are not applied.
FAMILIES.register("mistral", Family("decoder", _mistral, weights, architecture="Mistral", root=ROOT, gguf=GGUF_LLAMA))
FAMILIES.register("mixtral", Family("decoder", _mixtral, _mixtral_weights, architecture="Mixtral", root=ROOT))
