"""One small file a family: how its Hugging Face config and weight names translate. No family has code of its own in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError, hint
from .base import Family


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
    )

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
