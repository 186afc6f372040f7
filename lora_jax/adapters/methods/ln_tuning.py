"""LayerNorm tuning (arXiv:2312.11420): the scales and biases of the base's norms train, `g` and `b` of `g (x - mean) / std + b`.

It adds nothing to the base, and is merged as it is: the norms have other numbers. All norms train, of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from flax import nnx
from pydantic import Field

from ...config.schema import AdapterConfig
from ..labels import HEAD, Table, base_labels
from .base import Method, register_method
from .peft_form import PeftForm

_MODULES = r"(.*\.)?[a-z_]*norm"
_NORMS = (rf"{_MODULES}\..*", "norm")


class LnTuningSection(AdapterConfig):
    method: Literal["ln_tuning"] = Field(default="ln_tuning", description="The base's norms train (arXiv:2312.11420).")


class LnTuningForm(PeftForm):
    peft_type, prefix, modules = "LN_TUNING", "ln_tuning_layers.", _MODULES
    defaults: ClassVar[dict[str, Any]] = {"exclude_modules": None, "modules_to_save": None, "target_modules": None}


class LnTuning(Method):
    """The norms of the base train, with what `bias` and `modules_to_save` name."""

    name, section, peft = "ln_tuning", LnTuningSection, LnTuningForm()
    ignores = ("rank", "rank_pattern", "alpha", "alpha_pattern", "targets", "exclude", "layers", "dropout", "nested_init")

    def labels(self, sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
        return (*HEAD, _NORMS, *base_labels(sites, bias, modules_to_save))

    def prepare(self, model: nnx.Module) -> None:
        self.refuse_without(model, _NORMS[0], "norms (modules whose name ends in 'norm')")


register_method("ln_tuning", LnTuning())
