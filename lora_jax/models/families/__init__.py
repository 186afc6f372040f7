"""One small file a family: how its Hugging Face config and weight names translate. No family has code of its own in a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError, hint
from ...weights.checkpoint import GGUFArchitecture
from .base import Family

register_family = FAMILIES.register


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a Hugging Face config, by its `model_type`.

    Args:
        config: the config.
        where: where it came from, for the message.

    Raises:
        InputError: no such family is registered; the message lists those that are.
    """
    name = config.get("model_type")
    if name is None and "architecture" in config:
        return _timm_family(config["architecture"], where)
    if not isinstance(name, str) or name not in FAMILIES.all():
        known = sorted(FAMILIES)
        raise InputError(f"{where}: model_type '{name}' is not supported. {hint(str(name), known)} Known: {', '.join(known)}.")
    return FAMILIES.all()[name]


def _timm_family(name: object, where: str) -> Family:
    """The family that has an architecture of timm's; a weight's tag after a dot is no part of the name."""
    families = {own: family for family in FAMILIES.all().values() for own in family.timm}
    if not isinstance(name, str) or name.partition(".")[0] not in families:
        known = sorted(families)
        raise InputError(f"{where}: architecture '{name}' is not supported. {hint(str(name), known)} Known: {', '.join(known)}.")
    return families[name.partition(".")[0]]


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """GGUF's `general.architecture` -> how it maps to Hugging Face, of all families that are read from GGUF."""
    return {family.gguf.name: family.gguf for family in FAMILIES.all().values() if family.gguf is not None}


# Keys of configs by what their values must be, so that no value is taken for another or leads to arrays that no file can fill.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_AXES = ("hidden_size", "vocab_size", "num_attention_heads", "n_embd", "n_head", "dim", "n_heads", "num_labels")
_AXES += ("d_model", "d_kv", "d_ff", "num_heads", "decoder_vocab_size", "encoder_ffn_dim", "decoder_ffn_dim")
_AXES += ("encoder_attention_heads", "decoder_attention_heads", "relative_attention_num_buckets")
_FLAGS = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "tie_word_embeddings", "use_parallel_residual")
_FLAGS += ("scale_embedding", "share_encoder_decoder_embeddings", "scale_decoder_outputs")
_FLAGS += ("scale_attn_weights", "use_sliding_window", "norm_topk_prob", "relative_attention", "share_att_key", "position_biased_input")
_POSITIVE = ("rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "rotary_emb_base", "factor", "logits_scaling")
_POSITIVE += ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "short_factor", "long_factor")
_POSITIVE += ("attn_logit_softcapping", "final_logit_softcapping")
_NUMBERS = ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "mscale", "mscale_all_dim")
_NEVER_NULL = ("logits_scaling", *_NUMBERS[:3])
_LISTS = ("layer_types", "no_rope_layers", "short_factor", "long_factor", "mlp_only_layers")
_OBJECTS = ("rope_scaling", "rope_parameters", "id2label")
_NAMES = (
    "rope_type",
    "type",
    "hidden_act",
    "hidden_activation",
    "activation",
    "activation_function",
    "classifier_pooling",
    "feed_forward_proj",
)
_FRACTIONS = ("partial_rotary_factor", "rotary_pct")
_EPSILONS = ("_eps", "_epsilon")
_LARGEST = 3e38  # of float32


def check_config(config: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuses values that no model can have, before anything is made of them.

    Args:
        config: the Hugging Face config.
        shapes: of the checkpoint's tensors: a model has no more layers than there are tensors, and no axis longer than their longest.

    Raises:
        InputError: a size beyond the tensors', or a number or flag that is none.
    """
    shapes = list(shapes)
    longest = max((axis for shape in shapes for axis in shape), default=0)
    for keys, most, what in ((_DEPTHS, len(shapes), "tensors"), (_AXES, longest, "numbers along the longest axis of any tensor")):
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and value > most:
                raise InputError(f"config.json: {key} = {value} does not fit the checkpoint, which has {most} {what}.")
    _check_values(config, "")


_TYPES: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (_FLAGS, bool, "true or false"),
    (_LISTS, list, "a list"),
    (_OBJECTS, Mapping, "an object"),
    (_NAMES, str, "a name"),
)


def _check_values(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        for keys, kind, said in _TYPES:
            if key in keys and not isinstance(value, (kind, type(None))):
                raise InputError(f"config.json: {where}{key} = {value!r} should be {said}.")
        if isinstance(value, Mapping) and (where or key in ("rope_scaling", "rope_parameters")):
            _check_values(value, f"{where}{key}.")
        for number in value if key in ("short_factor", "long_factor") and value is not None else [value]:
            limits = _limits(key)
            null_is_absent = not (isinstance(value, list) or key in _NEVER_NULL or key.endswith(_EPSILONS))
            if (number is None and null_is_absent) or (limits is None and not isinstance(number, float)):
                continue
            least, most, said = limits or (-_LARGEST, _LARGEST, "a finite number")
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not least <= number <= most:  # NaN is not within
                raise InputError(f"config.json: {where}{key} = {number!r} should be {said}.")


def _limits(key: str) -> tuple[float, float, str] | None:
    """The least and the largest value of a key's number, and that in words; None where the key has no limits of its own."""
    if key.endswith(_EPSILONS):
        return 0.0, _LARGEST, "a finite number, 0 or more"
    if key in _POSITIVE:
        return math.ulp(0.0), _LARGEST, "a finite number above 0"
    if key in _FRACTIONS:
        return math.ulp(0.0), 1.0, "a number above 0, at most 1"
    return (-_LARGEST, _LARGEST, "a finite number") if key in _NUMBERS else None
