"""Full fine-tuning, a baseline: every weight of the base trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ...config.schema import AdapterConfig
from ..labels import HEAD, Table
from .base import Method, register_method


class FullSection(AdapterConfig):
    method: Literal["full"] = Field(default="full", description="Full fine-tuning, a baseline: every weight of the base trains.")


class Full(Method):
    """Every weight of the base trains: no adapters, and nothing is frozen."""

    name, section = "full", FullSection
    ignores = ("rank", "rank_pattern", "alpha", "alpha_pattern", "targets", "exclude", "layers", "dropout", "nested_init", "bias")
    packs = "weight-sized"

    def labels(self, sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
        return (*HEAD, (r"(.*\.)?[a-z_]*norm\..*", "norm"), (r".*\.bias", "bias"), (r".*", "full"))


register_method("full", Full())
