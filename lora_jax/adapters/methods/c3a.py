"""C3A (arXiv:2407.19342): `h = W x + C x / inputs`, C of circulant blocks (b, b), each known by its b numbers w: `C_kj = w[(j - k) mod b]`.

A block times x is a circular correlation, `FFT^-1(FFT(x) * conj(FFT(w)))`. The rank is the size b of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import Rank
from ...errors import InputError, nearest_numbers
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight


class C3aSection(AdapterConfig):
    method: Literal["c3a"] = Field(default="c3a", description="Block-circular convolutions, W + C (arXiv:2407.19342).")
    rank: Rank = Field(default=256, description="Size of a block; divides inputs and outputs of every adapted module.")
    init_weights: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = Field(
        default="zeros", description="How the blocks start. PEFT's default is xavier_uniform, with which step 0 is not the base."
    )


class C3aForm(PeftForm):
    """`c3a_kernel` (outputs / b, inputs / b, b).

    A key of `block_size_pattern` has to follow a dot of the module's name, unlike one of `rank_pattern` in other types.
    """

    peft_type, prefix, only, conv1d = "C3A", "c3a_", "c3a_only", False
    defaults: Mapping[str, Any] = {
        "bias": "none", "block_size": 256, "block_size_pattern": {}, "init_weights": "xavier_uniform", "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "block_size", "rank_pattern": "block_size_pattern"}
    notes = frozenset({"init_weights"})

    def values(self, read: Reader) -> dict[str, Any]:
        found = super().values(read)
        return found | {"rank_pattern": {rf".*\.{key}": size for key, size in found["rank_pattern"].items()}}

    def fields(self, section: Any) -> dict[str, Any]:
        found = {}
        for key, size in section.rank_pattern.items():
            _, dot, rest = key.partition(r"\.")
            literal = dot and key == re.escape(re.sub(r"\\(.)", r"\1", key))  # a module by its name: without its first part
            found[rest if literal else key.removeprefix(r".*\.")] = size
        return super().fields(section) | {"block_size_pattern": found}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"c3a_kernel": (site.outputs // rank, site.inputs // rank, rank)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"c3a_kernel": arrays["circulant"].reshape(-1, rank, site.inputs // rank).swapaxes(1, 2)}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"circulant": tensors["c3a_kernel"].swapaxes(1, 2).reshape(site.outputs, -1)}


class C3a(Method):
    """Block-circular convolutions.

    A site keeps a row for each output: row k of block row m has the numbers w[k] of that row's blocks, inputs / b of them. Smaller
    blocks have longer rows, and a pack's rows are as long as its smallest blocks need. No FFT is of a traced size: a pack computes one
    convolution for each size that its members have at a site, and of all but its own a member's numbers are 0 there.
    """

    name, section = "c3a", C3aSection
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern")
    peft = C3aForm()
    setting_names = ("block",)
    self_padding = True  # a convolution does not read what is beyond its rows

    def check(self, config: C3aSection, site: Site, rank: int) -> None:
        common = math.gcd(site.inputs, site.outputs)
        if common % rank:
            near = nearest_numbers(rank, (n for n in range(1, common + 1) if common % n == 0))
            sizes = f"{site.inputs} inputs and {site.outputs} outputs of {site.name}"
            raise InputError(f"adapter.rank: blocks of {rank} do not divide the {sizes}. {near}")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {"circulant": Parameter((site.outputs, site.inputs // rank), axes=("out", None))}

    def extent(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(set(ranks)))

    def settings(self, config: C3aSection, rank: int, alpha: float) -> dict[str, float]:
        return {"block": rank}

    def init(self, site: Site, rank: int, config: C3aSection, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        shape = (site.outputs, site.inputs // rank)
        if config.init_weights == "zeros":
            return {}
        if config.init_weights == "gaussian":
            return {"circulant": random.standard_normal(shape, np.float32)}
        bound = math.sqrt(6 / (site.inputs + site.outputs) if config.init_weights == "xavier_uniform" else 1 / site.inputs)
        return {"circulant": (2 * random.random(shape, np.float32) - 1) * np.float32(bound)}

    def cost(self, site: Site, rank: int) -> int:
        transforms = 2.5 * (site.inputs + site.outputs) * math.log2(max(rank, 2))
        return 4 * self.count(site, rank) + round(transforms)

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y, x = module.base(*inputs), inputs[0].astype(jnp.float32)  # no FFT is of bfloat16
        first, *others = (convolved(x, kernel) / x.shape[-1] for kernel in blocks_of(module))
        return y + sum(others, first).astype(y.dtype)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        for kernel in blocks_of(module):
            size = kernel.shape[-2]
            at = jnp.arange(size)
            blocks = kernel[..., (at[:, None] - at) % size, :]  # (..., block row m, j, k, block column n)
            blocks = jnp.moveaxis(blocks, (-1, -3, -4, -2), (-4, -3, -2, -1))  # n, j, m, k
            weight = weight + blocks.reshape(weight.shape) / weight.shape[-2]
        return weight, bias


def blocks_of(module: AdaptedSite) -> list[jax.Array]:
    """For each size b of the pack's blocks the first columns, (..., outputs / b, b, inputs / b); 0 where a layer's are of another size."""
    kernel, block, found = module.circulant[...], module.block[...], []
    for size in module.extent:
        own = jnp.where((block == size)[..., None, None], kernel[..., : module.site.inputs // size], 0)
        found.append(own.reshape(*own.shape[:-2], -1, size, own.shape[-1]))
    return found


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """C x, (..., outputs), of x (..., inputs) and the kernel (outputs / b, b, inputs / b) of one layer."""
    size = kernel.shape[-2]
    of_x, of_kernel = jnp.fft.rfft(x.reshape(*x.shape[:-1], -1, size)), jnp.fft.rfft(kernel, axis=-2)
    # x * conj(w) in real products: no complex number can be kept for a backward pass that recomputes others.
    both = jnp.concatenate([of_x.real, of_x.imag], -2)
    real = jnp.einsum("...nf,mfn->...mf", both, jnp.concatenate([of_kernel.real, of_kernel.imag], -1))
    imag = jnp.einsum("...nf,mfn->...mf", both, jnp.concatenate([-of_kernel.imag, of_kernel.real], -1))
    return jnp.fft.irfft(jax.lax.complex(real, imag), size).reshape(*x.shape[:-1], -1)


register_method("c3a", C3a())
