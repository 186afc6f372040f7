"""Hugging Face's rotary settings, in their old form (`rope_theta`, `rope_scaling`) and their new one (`rope_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import InputError, hint
from ..rotary import Rotary
from .base import size

# Kind -> the keys it needs, and those it may have; all may have the ones of `_COMMON`.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned")


def rotary(hf: Mapping[str, Any], head_dim: int, *, layer: str = "", theta: float = 10000.0, fraction: float = 1.0) -> Rotary:
    """A model's rotary positions.

    Args:
        hf: the config.
        layer: the layer's type, where settings differ between them (`full_attention`, `sliding_attention`).
        theta: the family's default.
        fraction: of a head's features that are rotated, where the config doesn't say.

    Raises:
        InputError: a kind of scaling that is not known, or settings that are missing or unknown.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    settings = hf.get(key) or {}
    if isinstance(settings.get(layer), Mapping):
        key, settings = f"{key}.{layer}", settings[layer]
    kind = settings.get("rope_type") or settings.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # its name in early Phi-3
    _check(key, kind, settings)
    fraction = settings.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or fraction
    found = Rotary(int(head_dim * fraction), settings.get("rope_theta") or hf.get("rope_theta") or theta, kind)
    if kind == "default":
        return found
    longest = size(hf, "max_position_embeddings")
    context = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or longest / context
    changes: dict[str, Any] = {"context": longest if kind == "dynamic" else context, "factor": factor}
    if kind == "llama3":
        changes |= {"slow": settings["low_freq_factor"], "fast": settings["high_freq_factor"]}
    elif kind == "yarn":
        changes |= {"slow": settings.get("beta_slow") or 1, "fast": settings.get("beta_fast") or 32}
        changes |= {"truncate": settings.get("truncate", True), "magnitude": _yarn_magnitude(settings, factor)}
    elif kind == "longrope":
        short, long = (tuple(settings[f"{name}_factor"]) for name in ("short", "long"))
        if {len(short), len(long)} != {found.dims // 2}:
            raise InputError(f"config.json: {key}: short_factor and long_factor should have {found.dims // 2} numbers each.")
        magnitude = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
        changes |= {"short": short, "long": long, "magnitude": settings.get("attention_factor") or magnitude}
    return Rotary(found.dims, found.theta, kind, **changes)


def _yarn_magnitude(settings: Mapping[str, Any], factor: float) -> float:
    """arXiv:2309.00071, eq. 22, or as DeepSeek has it, with two factors of its logarithm."""
    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    return magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)


def _check(key: str, kind: str, settings: Mapping[str, Any]) -> None:
    if kind not in _KINDS:
        raise InputError(f"config.json: {key}: rope_type '{kind}' is not supported. {hint(kind, _KINDS)} Known: {', '.join(_KINDS)}.")
    needed, optional = _KINDS[kind]
    for name in needed:
        if settings.get(name) is None:
            raise InputError(f"config.json: {key}: rope_type '{kind}' needs '{name}'.")
    unknown = sorted(set(settings) - {*needed, *optional, *_COMMON})
    if unknown:
        raise InputError(f"config.json: {key}: '{unknown[0]}' is not a setting of rope_type '{kind}' that is supported.")
