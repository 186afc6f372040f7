"""TinyLoRA (arXiv:2602.04118): LoRA-XS whose r x r matrix is a sum of fixed random ones, `h = W x + B (sum_i v_i P_i) A x`; v trains.

With `W = U S V^T`, A is S_r^(1/2) V_r^T and B is U_r S_r^(1/2), as in PEFT, which shares the singular values out between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import NonNegativeFloat, PositiveInt
from ...models.layers import Rows
from ..draws import check_singular_rank, singular_vectors
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight


class TinyLoraSection(AdapterConfig):
    method: Literal["tinylora"] = Field(
        default="tinylora", description="A small vector of weights for random r x r matrices (arXiv:2602.04118)."
    )
    u: PositiveInt = Field(default=64, description="Length of the trained vector v of a layer.")
    weight_tying: Literal[0, 1] = Field(default=0, description="1: all layers of all sites share one v; 0: each has its own.")
    init_v_bound: NonNegativeFloat = Field(
        default=0.0, description="v starts uniformly between minus this and this; PEFT's 'uniform': 0.02."
    )


class TinyLoraForm(PeftForm):
    """`tinylora_A`, `tinylora_B` and `tinylora_P` of a module; `tinylora_v` at the root, numbered by the module, or one that all share."""

    peft_type, prefix, only = "TINYLORA", "tinylora_", "tinylora_only"
    defaults: Mapping[str, Any] = {
        "bias": "none", "fan_in_fan_out": False, "init_v_bound": 0.02, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "projection_seed": 42, "r": 2, "save_projection": True,
        "target_modules": None, "tinylora_dropout": 0.0, "u": 64, "weight_tying": 0.0,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "dropout": "tinylora_dropout", "u": "u"}
    own = frozenset({"weight_tying"})
    # How v started, and how P was drawn: the file holds both.
    notes = frozenset({"fan_in_fan_out", "init_v_bound", "init_weights", "projection_seed", "save_projection"})
    numbered = ("tinylora_v",)

    def values(self, read: Reader) -> dict[str, Any]:
        if (tied := read.number("weight_tying", 0.0, lowest=0.0)) not in (0, 1):
            raise read.wrong("weight_tying", "0 (no module shares its vector) or 1 (all share one)")
        return super().values(read) | {"weight_tying": int(tied)}

    def fields(self, section: Any) -> dict[str, Any]:
        return super().fields(section) | {"weight_tying": float(section.weight_tying), "save_projection": True}

    def rank_at(self, site: Site, rank: int, read: Reader) -> int:
        return min(rank, site.inputs, site.outputs)

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        found = {"tinylora_A": (rank, site.inputs), "tinylora_B": (site.outputs, rank), "tinylora_P": (section.u, rank, rank)}
        return found if section.weight_tying else found | {"tinylora_v": (section.u,)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {"tinylora_A": arrays["frozen_a"].T, "tinylora_B": arrays["frozen_b"].T, "tinylora_P": arrays["projections"].swapaxes(1, 2)}
        return found if section.weight_tying else found | {"tinylora_v": arrays["v"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        found = {"frozen_a": tensors["tinylora_A"].T, "frozen_b": tensors["tinylora_B"].T}
        found |= {"projections": tensors["tinylora_P"].swapaxes(1, 2)}
        return found if section.weight_tying else found | {"v": tensors["tinylora_v"]}

    def shared(self, section: Any, sites: Mapping[Site, int]) -> dict[str, tuple[int, ...]]:
        return {"tinylora_v.0": (section.u,)} if section.weight_tying else {}

    def shared_to_file(self, section: Any, sites: Mapping[Site, int], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tinylora_v.0": arrays["v"]} if section.weight_tying else {}

    def shared_from_file(self, section: Any, sites: Mapping[Site, int], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"v": tensors["tinylora_v.0"]} if section.weight_tying else {}


@dataclasses.dataclass(frozen=True)
class TinyLora(Method):
    """A trained vector v of `length` weights, of each layer or of all of them (`tied`). There is no alpha."""

    length: int = 64
    tied: bool = False

    name, section = "tinylora", TinyLoraSection
    kinds = ("linear", "convolution")
    ignores = ("alpha", "alpha_pattern")
    dropout_kinds = ("linear", "convolution")
    setting_names = ("adapted",)
    packs = "low-rank"
    peft = TinyLoraForm()
    self_padding = True  # beyond the rank A, B and P are 0; `adapted` is 0 at a layer that is not adapted

    def variant(self, config: TinyLoraSection) -> Method:
        return TinyLora(config.u, bool(config.weight_tying))

    def check(self, config: TinyLoraSection, site: Site, rank: int) -> None:
        check_singular_rank(site, rank)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {
            "frozen_a": Parameter((site.inputs, rank), axes=("in", None), trained=False),
            "frozen_b": Parameter((rank, site.outputs), axes=(None, "out"), trained=False),
            "projections": Parameter((self.length, rank, rank), axes=(None, None, None), trained=False),
            "v": Parameter((self.length,), axes=(None,), scope="adapter" if self.tied else "layer"),
        }

    def settings(self, config: TinyLoraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"adapted": 1.0}

    def init(self, site: Site, rank: int, config: TinyLoraSection, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        left, values, right = singular_vectors(data.weight())  # of W^T, as weights are stored here
        root = np.sqrt(values[:rank])
        drawn = random.standard_normal((self.length, rank, rank), np.float32) / np.float32(np.sqrt(rank))
        found = {"frozen_a": left[:, :rank] * root, "frozen_b": root[:, None] * right[:rank], "projections": drawn}
        return found if self.tied else found | {"v": self._drawn(config, random)}

    def init_shared(self, sites: Mapping[Site, int], config: TinyLoraSection, random: np.random.Generator) -> dict[str, np.ndarray]:
        return {"v": self._drawn(config, random)} if self.tied else {}

    def _drawn(self, config: TinyLoraSection, random: np.random.Generator) -> np.ndarray:
        return (np.float32(config.init_v_bound) * (2 * random.random(self.length, np.float32) - 1)).astype(np.float32)

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        middle = jnp.tensordot(module.v[...], module.projections[...], 1) * module.adapted[...]
        a, b = (v[...].astype(y.dtype) for v in (module.frozen_a, module.frozen_b))
        low = module.project(module.drop(inputs[0], rows).astype(y.dtype), a)
        return y + jnp.matmul(jnp.matmul(low, middle.astype(y.dtype)), b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = self.low_rank(module)
        return weight + scale[..., None, None] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        middle = jnp.einsum("...u,...urq->...rq", module.v[...], module.projections[...], precision=jax.lax.Precision.HIGHEST)
        return jnp.matmul(module.frozen_a[...], middle, precision=jax.lax.Precision.HIGHEST), module.frozen_b[...], module.adapted[...]

    def count(self, site: Site, rank: int) -> int:
        return 0 if self.tied else self.length

    def cost(self, site: Site, rank: int) -> int:
        return 2 * rank * (site.inputs + site.outputs + rank)


register_method("tinylora", TinyLora())
