"""Linear probing, a baseline: only the task's head trains, or what of the base is named as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from flax import nnx
from pydantic import Field

from ...config.schema import AdapterConfig
from ...models.stack import Stack
from ..labels import Table, base_labels
from .base import Method, register_method


class HeadSection(AdapterConfig):
    method: Literal["head"] = Field(default="head", description="Only the task's head trains, a baseline.")


class Head(Method):
    """The task's head trains, with what `modules_to_save` names: a policy's heads are part of its base."""

    name, section = "head", HeadSection
    ignores = ("rank", "rank_pattern", "alpha", "alpha_pattern", "targets", "exclude", "layers", "dropout", "nested_init", "bias")

    def labels(self, sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
        return base_labels((), "none", modules_to_save)

    def prepare(self, model: nnx.Module) -> None:
        """Cuts off each stack's top layer: it stays with the head, because it is run for few positions; what is below is the trunk."""
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Stack) and module.depth > 1:
                module.split_at(module.depth - 1)


register_method("head", Head())
