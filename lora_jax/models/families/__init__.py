"""One small file a family: how its Hugging Face config and weight names translate. No family has code of its own in a model."""

from __future__ import annotations

from collections.abc import Mapping
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
    if not isinstance(name, str) or name not in FAMILIES.all():
        known = sorted(FAMILIES)
        raise InputError(f"{where}: model_type '{name}' is not supported. {hint(str(name), known)} Known: {', '.join(known)}.")
    return FAMILIES.all()[name]


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """GGUF's `general.architecture` -> how it maps to Hugging Face, of all families that are read from GGUF."""
    return {family.gguf.name: family.gguf for family in FAMILIES.all().values() if family.gguf is not None}
