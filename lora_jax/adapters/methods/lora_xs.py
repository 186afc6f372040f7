"""LoRA-XS (arXiv:2405.17604, eq. 2): `h = W x + s B R A x`; R (r x r) trains, A and B are the frozen top singular vectors of W.

With `W = U S V^T`, A is V_r^T and B is U_r S_r. The paper draws R from N(0, 1e-5^2); here it starts at 0 (its gradient is not 0 there), so
that a member starts as the base, bit for bit; `init_std` gives the paper's.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import NonNegativeFloat
from ...models.layers import Rows
from ..draws import check_singular_rank, singular_vectors
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method


class LoraXsSection(AdapterConfig):
    method: Literal["lora_xs"] = Field(
        default="lora_xs", description="An r x r matrix between frozen singular vectors of W (arXiv:2405.17604)."
    )
    init_std: NonNegativeFloat = Field(default=0.0, description="Standard deviation of R at the start; the paper's is 1e-5.")


class LoraXs(Method):
    """A trained (rank, rank) matrix between a weight's own singular vectors, scaled by alpha / rank."""

    name, section = "lora_xs", LoraXsSection
    kinds = ("linear", "convolution")
    dropout_kinds = ("linear", "convolution")
    setting_names = ("scale",)
    packs = "low-rank"
    self_padding = True  # A and B are 0 beyond the rank, the scale is 0 at a layer that is not adapted

    def check(self, config: LoraXsSection, site: Site, rank: int) -> None:
        check_singular_rank(site, rank)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {
            "frozen_a": Parameter((site.inputs, rank), axes=("in", None), trained=False),
            "frozen_b": Parameter((rank, site.outputs), axes=(None, "out"), trained=False),
            "middle": Parameter((rank, rank), axes=(None, None)),
        }

    def settings(self, config: LoraXsSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / rank}

    def init(self, site: Site, rank: int, config: LoraXsSection, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        left, values, right = singular_vectors(data.weight())  # of W^T, as weights are stored here
        drawn = random.standard_normal((rank, rank), np.float32) * np.float32(config.init_std)
        return {"frozen_a": left[:, :rank], "frozen_b": values[:rank, None] * right[:rank], "middle": drawn}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, middle, scale = (v[...].astype(y.dtype) for v in (module.frozen_a, module.frozen_b, module.middle, module.scale))
        low = module.project(module.drop(inputs[0], rows).astype(y.dtype), a)
        return y + jnp.matmul(jnp.matmul(low, middle) * scale, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = self.low_rank(module)
        return weight + scale[..., None, None] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        middle = jnp.matmul(module.frozen_a[...], module.middle[...], precision=jax.lax.Precision.HIGHEST)
        return middle, module.frozen_b[...], module.scale[...]

    def cost(self, site: Site, rank: int) -> int:
        return 2 * rank * (site.inputs + site.outputs + rank)


register_method("lora_xs", LoraXs())
