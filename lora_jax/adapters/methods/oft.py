"""OFT (OFTv2, arXiv:2506.19847): `h = W (R x)`, R orthogonal and block-diagonal, of blocks `(I + Q)(I - Q)^-1` with Q skew.

The inverse is a Neumann series cut off: `R = I + 2 Q + 2 Q^2 + ... + Q^p`. The rank is the size of a block.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import PositiveFloat, Rank
from ...errors import InputError, nearest_numbers, warn
from ...models.layers import Rows
from ..parameters import Parameter, SiteArrays
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight


class OftSection(AdapterConfig):
    method: Literal["oft"] = Field(default="oft", description="Inputs rotated in blocks, W (R x) (arXiv:2506.19847).")
    rank: Rank = Field(default=32, description="Size of a block; divides the inputs of every adapted module.")
    use_cayley_neumann: bool = Field(default=True, description="R by a Neumann series. false: by the inverse itself, which costs more.")
    num_cayley_neumann_terms: int = Field(default=5, ge=2, le=64, description="Terms of that series. 3 are computed as 4 (so does PEFT).")
    block_share: bool = Field(default=False, description="One block for all blocks of a module.")
    coft: bool = Field(default=False, description="Keep each block near the identity, within eps (constrained OFT, arXiv:2306.07280).")
    eps: PositiveFloat = Field(default=6e-5, description="With coft: the largest norm of Q, times the root of the number of blocks.")


class OftForm(PeftForm):
    """`oft_R.weight` (blocks, b (b - 1) / 2), what is above a block's diagonal row by row; one block where they are shared.

    A config says the size of a block or, with `r`, their number; PEFT takes the nearest that divides the inputs.
    """

    peft_type, prefix, only, conv1d = "OFT", "oft_", "oft_only", False
    defaults: Mapping[str, Any] = {
        "bias": "none", "block_share": False, "coft": False, "eps": 6e-05, "exclude_modules": None, "fan_in_fan_out": False,
        "init_weights": True, "layers_pattern": None, "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None,
        "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0, "target_modules": None, "use_cayley_neumann": True,
    }  # fmt: skip
    words: Mapping[str, str] = {
        "rank": "oft_block_size", "block_share": "block_share", "coft": "coft", "eps": "eps",
        "num_cayley_neumann_terms": "num_cayley_neumann_terms", "use_cayley_neumann": "use_cayley_neumann",
    }  # fmt: skip
    own = frozenset({"r"})
    notes = frozenset({"fan_in_fan_out", "init_weights"})
    unsupported: Mapping[str, str] = {"module_dropout": "dropout of blocks is not supported"}

    def check(self, read: Reader) -> None:
        if "oft_block_size" not in read.raw:
            raise InputError(f"{read.where}: 'oft_block_size' is missing: OFT files from before PEFT 0.14 hold other numbers.")
        if (read.raw["oft_block_size"] == 0) != (read.whole("r", 0) > 0):
            raise read.wrong("r", "above 0 where oft_block_size is 0, and 0 where it is not")
        version = re.match(r"0\.(\d+)", str(read.raw.get("peft_version") or "0.0"))
        if read.flag("use_cayley_neumann", True) and version is not None and int(version[1]) < 18:
            warn(f"{read.where}: PEFT computes the Neumann series in another way since 0.18, and so do we; the file is of an earlier one.")

    def values(self, read: Reader) -> dict[str, Any]:
        whole = read.raw | ({"oft_block_size": 32} if read.whole("r", 0) else {})
        return super().values(Reader(whole, read.where))

    def rank_at(self, site: Site, rank: int, read: Reader) -> int:
        blocks = read.whole("r", 0)
        wanted = min(blocks or rank, site.inputs)
        fits = [n for n in range(1, site.inputs + 1) if site.inputs % n == 0]
        near = min(fits, key=lambda n: abs(n - wanted))  # of two as near the smaller
        return site.inputs // near if blocks else near

    def placed(self, section: Any, modules: Mapping[str, Site], read: Reader) -> Any:
        ranks = {re.escape(name): self.rank_at(site, section.rank, read) for name, site in modules.items()}
        return section.model_copy(update={"rank_pattern": {name: rank for name, rank in ranks.items() if rank != section.rank}})

    def fields(self, section: Any) -> dict[str, Any]:
        return super().fields(section) | {"r": 0}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"oft_R.weight": (1 if section.block_share else site.inputs // rank, rank * (rank - 1) // 2)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"oft_R.weight": arrays["skew"].reshape(-1, rank, rank)[:, *np.triu_indices(rank, 1)]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        found = np.zeros((len(tensors["oft_R.weight"]), rank, rank), np.float32)
        found[:, *np.triu_indices(rank, 1)] = tensors["oft_R.weight"]
        return {"skew": found.reshape(-1, rank)}


@dataclasses.dataclass(frozen=True)
class Oft(Method):
    """Inputs rotated in blocks.

    A site keeps the numbers above the diagonals of its blocks as rows, one an input and as long as a block: rows of small blocks are the
    leading part of those of large ones. A pack computes in blocks of the least common multiple of its members' sizes, each made of a
    member's small blocks: sums and products of block-diagonal matrices have the same blocks.

    Attributes: as in the section.
    """

    neumann: bool = True
    terms: int = 5
    block_share: bool = False
    coft: bool = False

    name, section = "oft", OftSection
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern")
    setting_names = ("block", "eps")
    peft = OftForm()
    self_padding = True  # what is not above a diagonal is not read: its gradient is 0

    def variant(self, config: OftSection) -> Oft:
        return Oft(config.use_cayley_neumann, config.num_cayley_neumann_terms, config.block_share, config.coft)

    def check(self, config: OftSection, site: Site, rank: int) -> None:
        if rank < 2 or site.inputs % rank:
            near = nearest_numbers(rank, (n for n in range(2, site.inputs + 1) if site.inputs % n == 0))
            raise InputError(f"adapter.rank: blocks of {rank} do not divide the {site.inputs} inputs of {site.name}. {near}")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        rows, axis = (rank, None) if self.block_share else (site.inputs, "in")
        return {"skew": Parameter((rows, rank), axes=(axis, None))}

    def extent(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return (math.lcm(*ranks),)

    def settings(self, config: OftSection, rank: int, alpha: float) -> dict[str, float]:
        return {"block": rank, "eps": config.eps}

    def count(self, site: Site, rank: int) -> int:
        return (1 if self.block_share else site.inputs // rank) * rank * (rank - 1) // 2

    def cost(self, site: Site, rank: int) -> int:
        return 2 * site.inputs * rank

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        x, change = inputs[0], self.change(module)
        blocks = x.reshape(*x.shape[:-1], -1, change.shape[-1])
        turned = jnp.einsum("...nk,nkc->...nc", blocks, jnp.broadcast_to(change, (blocks.shape[-2], *change.shape[1:])).astype(x.dtype))
        return module.base((blocks + turned).reshape(x.shape))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        change = self.change(module)
        blocks = weight.reshape(*weight.shape[:-2], -1, change.shape[-1], weight.shape[-1])
        turned = jnp.matmul(change, blocks, precision=jax.lax.Precision.HIGHEST)
        return (blocks + turned).reshape(weight.shape), bias

    def change(self, module: AdaptedSite) -> jax.Array:
        """R - I, (..., blocks, size, size) float32: of rows `x (R - I)` is what is added. One block where they are shared.

        It is kept apart from I so that a small angle survives a cast to bfloat16, and an angle of 0 changes no bit.
        """
        skew, block, size = module.skew[...], module.block[...], max(module.extent)
        if self.coft:  # as PEFT: what a file holds is brought within eps before it is used; the gradient is not
            skew += jax.lax.stop_gradient(self.projected(skew, block, module.eps[...]) - skew)
        within, same, above = places(block, size)
        # Column j of a block of the pack is column j % block of a member's own.
        spread = (jnp.arange(size)[:, None] == within[..., None, :]).astype(skew.dtype)
        if self.block_share:
            skew = product(spread.swapaxes(-1, -2), skew)
        upper = product(skew.reshape(*skew.shape[:-2], -1, size, size), spread[..., None, :, :])
        upper = jnp.where((same & above)[..., None, :, :], upper, 0)
        q = upper - upper.swapaxes(-1, -2)
        if not self.neumann:  # PEFT's exact form is (I - Q)(I + Q)^-1, the transpose of the other: of -Q
            return jnp.linalg.solve(jnp.eye(size) + q, -2 * q)
        total, power, highest = 2 * q, q, 1 if self.terms == 2 else max(self.terms, 4) - 1
        for degree in range(2, highest + 1):
            power = product(power, q)
            total += power if degree == highest else 2 * power
        return total

    def projected(self, skew: jax.Array, block: jax.Array, eps: jax.Array) -> jax.Array:
        """The rows with each block's norm at most `eps / sqrt(blocks)`; arguments (..., rows, size), (...) and (...)."""
        size, rows = skew.shape[-1], skew.shape[-2]
        within, same, _ = places(block, size)
        at = jnp.arange(size)
        used = (at > within[..., :, None]) & (at < block[..., None, None])
        squares = jnp.where(used[..., None, :, :], skew.reshape(*skew.shape[:-2], -1, size, size) ** 2, 0).sum(-1)
        norm = jnp.sqrt(2 * product(squares, same[..., :, :].astype(skew.dtype))).reshape(skew.shape[:-1])
        limit = eps if self.block_share else eps * jnp.sqrt(block / rows)
        return skew * jnp.minimum(1, limit[..., None] / jnp.maximum(norm, 1e-30))[..., None]

    @property
    def has_state(self) -> bool:
        return self.coft

    def after_step(
        self, state: dict[str, Any], trainable: dict[str, jax.Array], gradients: Any, sites: Mapping[str, SiteArrays], step: Any, steps: Any
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        own = {f"{name}.skew": site for name, site in sites.items()}
        return state, trainable | {name: self.projected(trainable[name], site.block, site.eps) for name, site in own.items()}


def places(block: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of rows and columns 0 to size - 1 cut into blocks: the place in its own (..., size), and (..., size, size) of row and column
    whether they are of one block, and whether the column comes after the row. Nothing is of one block where `block`, (...), is 0."""
    number = jnp.maximum(block, 1).astype(jnp.int32)[..., None]
    at = jnp.arange(size)
    same = (at // number)[..., :, None] == (at // number)[..., None, :]
    return at % number, same & (block > 0)[..., None, None], at[:, None] < at


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full float32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


register_method("oft", Oft())
