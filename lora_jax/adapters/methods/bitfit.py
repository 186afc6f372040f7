"""BitFit (arXiv:2106.10199): the biases of the base train, `b` of `W x + b` and of the norms, and no weight.

It adds nothing to the base, and is merged as it is. A base without biases (Llama's) has nothing to train, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from flax import nnx
from pydantic import Field

from ...config.schema import AdapterConfig
from ..labels import HEAD, Table, base_labels
from .base import Method, register_method

_BIASES = (r"(.*\.)?bias", "bias")


class BitFitSection(AdapterConfig):
    method: Literal["bitfit"] = Field(default="bitfit", description="All biases of the base train (arXiv:2106.10199).")


class BitFit(Method):
    """The biases of the base train, with what `modules_to_save` names."""

    name, section = "bitfit", BitFitSection
    ignores = ("rank", "rank_pattern", "alpha", "alpha_pattern", "targets", "exclude", "layers", "dropout", "nested_init", "bias")

    def labels(self, sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
        return (*HEAD, _BIASES, *base_labels((), "none", modules_to_save))

    def prepare(self, model: nnx.Module) -> None:
        self.refuse_without(model, _BIASES[0], "biases")


register_method("bitfit", BitFit())
