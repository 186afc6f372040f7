"""RoAd (arXiv:2409.00119): `h = R (W x + b)`, R of 2 x 2 blocks that turn and stretch pairs of outputs.

`h_i = a_i cos(t_i) y_i - a_i sin(t_i) y_j` and `h_j = a_j cos(t_j) y_j + a_j sin(t_j) y_i`, for an output i of the first half of a group
and the output j at its place in the second half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError, nearest_numbers
from ...models.layers import Rows
from ..parameters import Parameter
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight

Variant = Literal["road_1", "road_2", "road_4"]

# How many numbers: for the columns of R that an output has, and for the two halves of a group.
_SHARED: dict[Variant, tuple[int, int]] = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}


class RoadSection(AdapterConfig):
    method: Literal["road"] = Field(default="road", description="Pairs of outputs turned and stretched (arXiv:2409.00119).")
    variant: Variant = Field(
        default="road_1",
        description="road_1: one angle and scale a pair. road_2: one an output. road_4: two an output, one for each column of R.",
    )
    group_size: int = Field(default=64, ge=2, multiple_of=2, description="Outputs in a group; its halves are paired. Divides the outputs.")


class RoadForm(PeftForm):
    """`road_theta` and `road_alpha`, as they are here."""

    peft_type, prefix, conv1d = "ROAD", "road_", False
    defaults: Mapping[str, Any] = {
        "group_size": 64, "init_weights": True, "modules_to_save": None, "target_modules": None, "variant": "road_1",
    }  # fmt: skip
    words: Mapping[str, str] = {"variant": "variant", "group_size": "group_size"}
    notes = frozenset({"init_weights"})

    def check(self, read: Reader) -> None:
        read.choice("variant", "road_1", get_args(Variant))

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {name: (site.outputs // 2 * math.prod(_SHARED[section.variant]),) for name in ("road_theta", "road_alpha")}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"road_theta": arrays["theta"], "road_alpha": arrays["alpha"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"theta": tensors["road_theta"], "alpha": tensors["road_alpha"]}


@dataclasses.dataclass(frozen=True)
class Road(Method):
    """Pairs of outputs turned by an angle `theta` and stretched by `alpha`. There is no rank: `adapter.rank` changes nothing.

    Arrays are as in PEFT: group after group; with `road_4` a group's numbers for its own outputs, then those for their partners'.

    Attributes: `variant` and `group_size` of the section.
    """

    sharing: Variant = "road_1"
    group_size: int = 64

    name, section = "road", RoadSection
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern", "rank", "rank_pattern", "nested_init")
    peft = RoadForm()

    def variant(self, config: RoadSection) -> Road:
        return Road(config.variant, config.group_size)

    def check(self, config: RoadSection, site: Site, rank: int) -> None:
        if site.outputs % config.group_size:
            near = nearest_numbers(config.group_size, (n for n in range(2, site.outputs + 1, 2) if site.outputs % n == 0))
            raise InputError(f"adapter.group_size: {config.group_size} does not divide the {site.outputs} outputs of {site.name}. {near}")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        size = site.outputs // 2 * math.prod(_SHARED[self.sharing])
        return {"theta": Parameter((size,), axes=("out",)), "alpha": Parameter((size,), axes=("out",), fill=1.0, decays=False)}

    def cost(self, site: Site, rank: int) -> int:
        return 3 * site.outputs

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        return self.turned(module, module.base(*inputs))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return self.turned(module, weight, 1), None if bias is None else self.turned(module, bias)

    def turned(self, module: AdaptedSite, y: jax.Array, between: int = 0) -> jax.Array:
        """R y in y's dtype; y is (..., outputs), with so many axes between the layers, where there are any, and the outputs."""
        columns, sides = _SHARED[self.sharing]
        half = self.group_size // 2
        theta, alpha = (v[...].reshape(*v.shape[:-1], *[1] * between, -1, columns, sides, half) for v in (module.theta, module.alpha))
        own, others = (alpha * jnp.cos(theta))[..., 0, :, :], (alpha * jnp.sin(theta))[..., -1, :, :]
        pairs = y.reshape(*y.shape[:-1], -1, 2, half)
        partners = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], -2)
        return (pairs * own + partners * others).astype(y.dtype).reshape(y.shape)


register_method("road", Road())
