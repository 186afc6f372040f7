"""IA3 (arXiv:2205.05638, section 3.3): `h = l * (W x + b)`, and in feed-forward layers `h = W (l * x) + b`; the vector l trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter
from ..sites import Site
from ..targets import PRESETS, matches
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight, one_of_each_site, outright


class Ia3Section(AdapterConfig):
    method: Literal["ia3"] = Field(default="ia3", description="Trained factors of activations (arXiv:2205.05638).")
    feedforward: str | list[str] = Field(
        default=["down_proj", "fc2"], description="Modules whose input is scaled, the others' output is; in the forms of targets."
    )


def _scales_input(feedforward: str | tuple[str, ...], site: Site) -> bool:
    """Whether a site is a feed-forward one.

    Raises:
        InputError: it is in some layers and not in others.
    """
    said = feedforward if isinstance(feedforward, str) else list(feedforward)
    found = {matches((*names, site.name), site.kind, said, lone=site.lone) for names in site.names}
    if len(found) > 1:
        raise InputError(f"adapter.feedforward: names {site.name} in some layers and not in others.")
    return found.pop()


class Ia3Form(PeftForm):
    """`ia3_l`, (1, inputs) of a feed-forward module and (outputs, 1) of another."""

    peft_type, prefix = "IA3", "ia3_"
    defaults: Mapping[str, Any] = {
        "exclude_modules": None, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True, "modules_to_save": None,
        "target_modules": None,
    }  # fmt: skip
    own = frozenset({"feedforward_modules"})
    notes = frozenset({"fan_in_fan_out", "init_ia3_weights"})

    def values(self, read: Reader) -> dict[str, Any]:
        said = read.modules("feedforward_modules")
        if said is None:
            raise read.wrong("feedforward_modules", "a list of names or a regular expression")
        return {"feedforward": said if isinstance(said, str) else list(said)}

    def fields(self, section: Any) -> dict[str, Any]:
        said = section.feedforward
        if isinstance(said, str) and said in PRESETS:
            raise InputError(f"adapter.feedforward: which modules '{said}' means depends on the model.")
        if isinstance(said, list) and isinstance(section.targets, list):  # PEFT wants the one among the other
            said = [name for name in said if name in section.targets]
        return {"feedforward_modules": said}

    def placed(self, section: Any, modules: Mapping[str, Site], read: Reader) -> Any:
        said = read.modules("feedforward_modules") or ()

        def meant(module: str) -> bool:
            if isinstance(said, str):
                return read.expressions.match(said, module) is not None
            return any(module.endswith(name) for name in said)  # dot or no dot

        sites = one_of_each_site(modules, meant, f"{read.where}: 'feedforward_modules'")
        return section.model_copy(update={"feedforward": sites})

    def places(self, section: Any, modules: Mapping[str, Site]) -> dict[str, Any]:
        sites = [site.name for site in dict.fromkeys(modules.values()) if _scales_input(section.feedforward, site)]
        return {"feedforward_modules": outright(modules, sites) or []}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (1, site.inputs) if _scales_input(section.feedforward, site) else (site.outputs, 1)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: arrays["ia3_l"].reshape(shape) for name, shape in self.tensors(section, site, rank).items()}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"ia3_l": tensors["ia3_l"].reshape(-1)}


@dataclasses.dataclass(frozen=True)
class Ia3(Method):
    """A factor for each output of a site, or for each input of a `feedforward` one. It starts at 1, and weight decay leaves it alone.

    There is no rank and no alpha. The paper's targets are keys, values and the last layer of an MLP.
    """

    feedforward: str | tuple[str, ...] = ("down_proj", "fc2")

    name, section = "ia3", Ia3Section
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern", "rank", "rank_pattern", "nested_init")
    packs = "activation"
    peft = Ia3Form()

    def variant(self, config: Ia3Section) -> Method:
        return Ia3(config.feedforward if isinstance(config.feedforward, str) else tuple(config.feedforward))

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        size, along = (site.inputs, "in") if _scales_input(self.feedforward, site) else (site.outputs, "out")
        return {"ia3_l": Parameter((size,), axes=(along,), fill=1.0, decays=False)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        (x,), scale = inputs, module.ia3_l[...]
        if _scales_input(self.feedforward, module.site):
            return module.base((x * scale).astype(x.dtype))
        y = module.base(x)
        return (y * scale).astype(y.dtype)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        scale = module.ia3_l[...]
        if _scales_input(self.feedforward, module.site):
            return weight * scale[..., :, None], bias
        return weight * scale[..., None, :], None if bias is None else bias * scale


register_method("ia3", Ia3())
