"""RandLoRA (arXiv:2502.00987, eq. 3): `W + s sum_n B_n L_n A G_n`, of full rank: random frozen bases, trained diagonals L_n and G_n.

There are n = ceil(min(in, out) / r) bases. A (r x the smaller side) is common to them, and A and the B_n are shared by all sites; a smaller
site uses their leading part. As in PEFT, the products are flattened base by base on one side and rank by rank on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import Seed
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight


class RandLoraSection(AdapterConfig):
    method: Literal["randlora"] = Field(
        default="randlora", description="Full-rank updates: diagonals around frozen, shared, random bases (arXiv:2502.00987)."
    )
    projection_seed: Seed | None = Field(default=None, description="Seed of the bases. Default: they are drawn by training.seed.")


def bases(site: Site, rank: int) -> int:
    """How many bases of this rank make a full-rank update."""
    return -(-min(site.inputs, site.outputs) // rank)


class RandLoraForm(PeftForm):
    """`randlora_lambda` (rank, bases) and `randlora_gamma` (bases, smaller side); of the whole adapter `randlora_A`, `randlora_B`."""

    peft_type, prefix, only = "RANDLORA", "randlora_", "randlora_only"
    defaults: Mapping[str, Any] = {
        "bias": "none", "fan_in_fan_out": False, "init_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "modules_to_save": None, "projection_prng_key": 0, "r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0,
        "save_projection": True, "sparse": False, "target_modules": None, "very_sparse": False,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}
    repeated = ("randlora_A", "randlora_B")
    # How the bases were drawn: the file holds them.
    notes = frozenset({"fan_in_fan_out", "init_weights", "projection_prng_key", "save_projection", "sparse", "very_sparse"})

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        count = bases(site, rank)
        return {"randlora_lambda": (rank, count), "randlora_gamma": (count, min(site.inputs, site.outputs))}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: arrays[name] for name in self.tensors(section, site, rank)}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return dict(tensors)

    def shared(self, section: Any, sites: Mapping[Site, int]) -> dict[str, tuple[int, ...]]:
        sides = [max((s.inputs for s in sites), default=0), max((s.outputs for s in sites), default=0)]
        rank = max(sites.values(), default=1)
        return {"randlora_A": (rank, 1, min(sides)), "randlora_B": (max(sides), -(-min(sides) // rank), rank)}

    def shared_to_file(self, section: Any, sites: Mapping[Site, int], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {"randlora_A": arrays["randlora_a"][:, None], "randlora_B": arrays["randlora_b"]}
        for name, shape in self.shared(section, sites).items():  # PEFT's are as large as the largest sides of different sites
            found[name] = np.pad(found[name], [(0, n - m) for n, m in zip(shape, found[name].shape, strict=True)])
        return found

    def shared_from_file(self, section: Any, sites: Mapping[Site, int], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        small = max(min(s.inputs, s.outputs) for s in sites)
        count = max(bases(site, rank) for site, rank in sites.items())
        large = max(max(s.inputs, s.outputs) for s in sites)
        return {"randlora_a": tensors["randlora_A"][:, 0, :small], "randlora_b": tensors["randlora_B"][:large, :count]}


class RandLora(Method):
    """Trained diagonals of size r and of the smaller side, for each base. A larger rank has fewer bases."""

    name, section = "randlora", RandLoraSection
    kinds = ("linear", "convolution")
    dropout_kinds = ("linear", "convolution")
    setting_names = ("scale", "own_rank")
    packs = "weight-sized"
    peft = RandLoraForm()
    self_padding = True  # what is not a member's own is never read, and 0; the scale is 0 at a layer that is not adapted

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        small, large, count = min(site.inputs, site.outputs), max(site.inputs, site.outputs), bases(site, rank)
        return {
            "randlora_a": Parameter((rank, small), axes=(None, None), trained=False, scope="adapter"),
            "randlora_b": Parameter((large, count, rank), axes=(None, None, None), trained=False, scope="adapter"),
            "randlora_lambda": Parameter((rank, count), axes=(None, None)),
            "randlora_gamma": Parameter((count, small), axes=(None, None)),
        }

    def extent(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys((max(ranks), min(ranks))))

    def settings(self, config: RandLoraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / rank, "own_rank": rank}

    def init(self, site: Site, rank: int, config: RandLoraSection, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        shape = (bases(site, rank), min(site.inputs, site.outputs))
        return {"randlora_gamma": np.full(shape, 1 / max(shape), np.float32)}

    def init_shared(self, sites: Mapping[Site, int], config: RandLoraSection, random: np.random.Generator) -> dict[str, np.ndarray]:
        sides, rank = (max(s.inputs for s in sites), max(s.outputs for s in sites)), max(sites.values())
        small, large = min(sides), max(sides)
        count = -(-small // rank)
        shapes, bounds = [(rank, 1, small), *[(large, 1, rank)] * count], [1 / np.sqrt(small), *[1 / np.sqrt(rank)] * count]
        random = random if config.projection_seed is None else np.random.default_rng(config.projection_seed)
        a, *b = (bound * (2 * random.random(shape, np.float32) - 1) for shape, bound in zip(shapes, bounds, strict=True))
        wide = np.concatenate(b, 1)
        return {"randlora_a": (a[:, 0] / a.std(ddof=1)).astype(np.float32), "randlora_b": (wide / wide.std(ddof=1)).astype(np.float32)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        first, second = self._factors(
            module.site,
            *(v[...] for v in (module.randlora_a, module.randlora_b, module.randlora_lambda, module.randlora_gamma, module.own_rank)),
        )
        low = module.project(module.drop(inputs[0], rows).astype(y.dtype), first.astype(y.dtype))
        return y + jnp.matmul(low * module.scale[...].astype(y.dtype), second.astype(y.dtype))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        own = module.randlora_lambda[...], module.randlora_gamma[...], module.own_rank[...], module.scale[...]

        def change(trained: jax.Array, gamma: jax.Array, rank: jax.Array, scale: jax.Array) -> jax.Array:
            first, second = self._factors(module.site, module.randlora_a[...], module.randlora_b[...], trained, gamma, rank)
            return scale * jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)

        return weight + (change(*own) if own[2].ndim == 0 else jax.lax.map(lambda layer: change(*layer), own)), bias

    @staticmethod
    def _factors(site: Site, a: jax.Array, b: jax.Array, trained: jax.Array, gamma: jax.Array, rank: jax.Array) -> tuple[jax.Array, ...]:
        """The change of the weight, unscaled, as a product of (inputs, k) and (k, outputs); k holds the products of every rank.

        Args:
            site: the site.
            a, b: the shared bases.
            trained, gamma, rank: of one layer; the rank is its own, without padding.
        """
        small, large = min(site.inputs, site.outputs), max(site.inputs, site.outputs)
        rank = jnp.maximum(rank.astype(jnp.int32), 1)
        count = -(-small // rank)
        k = jnp.arange(small + trained.shape[0] - 1)
        k, valid = jnp.where(k < rank * count, k, 0), (k < rank * count).astype(a.dtype)
        narrow = (valid * trained[k // count, k % count])[:, None] * a[k // count, :small] * gamma[k % count]
        wide = b[:large, k // rank, k % rank]
        return (narrow.T, wide.T) if site.inputs == small else (wide, narrow)

    def cost(self, site: Site, rank: int) -> int:
        return 2 * (min(site.inputs, site.outputs) + rank) * (site.inputs + site.outputs)


register_method("randlora", RandLora())
