"""SHiRA, a sparse update (arXiv:2406.13175, eq. 1): `h = W x + S x`, S (out x in) with r (in + out) numbers at places drawn at random.

As many numbers as LoRA of rank r, of a change of any rank. The places are a member's own frozen numbers, the row (input) and column
(output) of each in the weight as it is kept here: whole numbers far below 2^24, which float32 holds exactly. S is formed whole, an array
of the weight's size a member, and formed anew for the backward pass. There is no scale, and so no `adapter.alpha`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight

_EXACT = 2**24


class ShiraSection(AdapterConfig):
    method: Literal["shira"] = Field(default="shira", description="Sparse updates at r (in + out) random places (arXiv:2406.13175).")


class ShiraForm(PeftForm):
    """`shira_weight` (numbers,) and `shira_indices` (2, numbers), whole numbers: each one's output and input."""

    peft_type, prefix, conv1d, integers = "SHIRA", "shira_", False, ("shira_indices",)
    defaults: Mapping[str, Any] = {
        "fan_in_fan_out": False, "init_weights": True, "mask_type": "random", "modules_to_save": None, "r": 32, "random_seed": None,
        "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r"}
    notes = frozenset({"fan_in_fan_out", "init_weights", "mask_type", "random_seed"})  # how the places were drawn: the file holds them

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        count = rank * (site.inputs + site.outputs)
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"shira_weight": arrays["values"], "shira_indices": arrays["places"][::-1].astype(np.int64)}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"values": tensors["shira_weight"], "places": tensors["shira_indices"][::-1]}


class Shira(Method):
    """A sparse update; its numbers start at 0, as PEFT's do. The places are drawn from the member's seed, those of a smaller rank first."""

    name, section = "shira", ShiraSection
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern")
    packs = "weight-sized"
    peft = ShiraForm()

    def check(self, config: ShiraSection, site: Site, rank: int) -> None:
        inputs, outputs = site.inputs, site.outputs
        if rank * (inputs + outputs) > inputs * outputs:
            most = inputs * outputs // (inputs + outputs)
            raise InputError(f"adapter.rank: {site.name} ({inputs} x {outputs}) has places for a rank of at most {most}, not {rank}.")
        if max(inputs, outputs) > _EXACT:
            raise InputError(f"adapter.targets: {site.name} has more than {_EXACT:,} inputs or outputs: places in it are not kept exactly.")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        count = rank * (site.inputs + site.outputs)
        return {"values": Parameter((count,), axes=(None,)), "places": Parameter((2, count), axes=(None, None), trained=False)}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        drawn = random.permutation(np.arange(site.inputs * site.outputs))[: rank * (site.inputs + site.outputs)]
        return {"places": np.stack(np.divmod(drawn, site.outputs)).astype(np.float32)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        return y + _changed(inputs[0].astype(y.dtype), y.shape[-1], module.places[...], module.values[...])

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        change = lambda places, values: _change(places, values, *weight.shape[-2:])
        return weight + (jax.vmap(change) if module.stacked else change)(module.places[...], module.values[...]), bias

    def cost(self, site: Site, rank: int) -> int:
        return 2 * site.inputs * site.outputs


def _change(places: jax.Array, values: jax.Array, inputs: int, outputs: int) -> jax.Array:
    row, column = places.astype(jnp.int32)
    # Added, not set: padding stands at the first place, with a value of 0.
    return jnp.zeros((inputs, outputs), values.dtype).at[row, column].add(values)


@functools.partial(jax.checkpoint, static_argnums=1)  # or S would be kept for the backward pass: an array of the weight's size a layer
def _changed(x: jax.Array, outputs: int, places: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.matmul(x, _change(places, values, x.shape[-1], outputs).astype(x.dtype))


register_method("shira", Shira())
