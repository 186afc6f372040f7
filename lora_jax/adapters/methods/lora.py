"""The NNX modules that stand at a site: the base's own module, and the low-rank update beside it.

LoRA (arXiv:2106.09685, eq. 3): `h = W x + scale * B A x` with A (r x in), B (out x r). Here x is a row, so A is stored (in, r) and
B (r, out). At a stacked site every array has the layers of its segment in front and the model's scan hands one layer to a call.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from ...config.doors import METHODS
from ...config.schema import AdapterConfig
from ...models.experts import grouped_matmul
from ...models.layers import AXES, PER_SEGMENT
from ...models.noise import uniform
from .base import Method


class LoRAParam(nnx.Variable):
    """A trainable factor. A type of its own, so that `nnx.Param` means the base alone."""


class AdapterSetting(nnx.Variable):
    """A number that belongs to a member but is not trained: scale, dropout rate, dropout key. Traced data, never a constant."""


@jax.custom_vjp
def widened(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low @ b`, (..., r) by (r, outputs), with B's gradient as `low^T dy`.

    JAX's own is `(dy^T low)^T`. On a CPU that turns the large dy over, and takes what dy is computed from (an activation's derivative)
    along into that copy, number by number: it cost a third of the step where an MLP is adapted. It has no forward-mode derivative.
    """
    return jnp.matmul(low, b)


def _widened_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(low, b), (low, b)


def _widened_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    rows = tuple(range(low.ndim - 1))
    return jnp.matmul(dy, b.T), jnp.tensordot(low, dy, (rows, rows))


widened.defvjp(_widened_forward, _widened_backward)


class LowRank(nnx.Module):
    """What all sites share: the factors, their scale and dropout.

    Args:
        base: the module that stood at the site.
        layers: layers of the segment, or None where the weight is not stacked.
        experts: at an expert site, of how many each has factors of its own.
        inputs, outputs, rank: shape of the factors, (inputs, rank) and (rank, outputs).
        dropout: whether any member drops inputs; without it there is no random number in the program.
    """

    weight = "kernel"

    def __init__(
        self, base: nnx.Module, *, layers: int | None, inputs: int, outputs: int, rank: int, dropout: bool, experts: int | None = None
    ):
        lead, own = () if layers is None else (layers,), () if experts is None else (experts,)
        stacked: dict[str, Any] = {PER_SEGMENT: True} if layers is not None else {}
        self.base: Any = base
        self.lora_a = LoRAParam(jnp.zeros((*lead, *own, inputs, rank)), **stacked)
        self.lora_b = LoRAParam(jnp.zeros((*lead, *own, rank, outputs)), **stacked)
        weight: nnx.Param = getattr(base, self.weight)
        if axes := weight.get_metadata().get(AXES):
            # A's input axis is the weight's, B's output axis too; the rank has no name and lies whole everywhere.
            self.lora_a.set_metadata(AXES, (*axes[:-1], None))
            self.lora_b.set_metadata(AXES, (*axes[:-2], None, axes[-1]))
        self.scale = AdapterSetting(jnp.zeros(lead), **stacked)
        self.deterministic = False
        if dropout:
            self.dropout_rate = AdapterSetting(jnp.zeros(lead), **stacked)
            self.dropout_key = AdapterSetting(jnp.broadcast_to(jax.random.key(0), lead), **stacked)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view(model, deterministic=True)` calls: no dropout from here on."""
        if deterministic is not None:
            self.deterministic = deterministic

    def drop(self, x: jax.Array) -> jax.Array:
        """x with a share of its entries set to 0 and the rest scaled up, while training; x itself otherwise."""
        if self.deterministic or not hasattr(self, "dropout_rate"):
            return x
        rate = self.dropout_rate[...]
        kept = uniform(self.dropout_key[...], x) >= rate
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)

    def update(self) -> jax.Array:
        """scale * A B, the change of the weight, of its shape: (..., inputs, outputs) float32."""
        scale = self.scale[...]
        scale = scale.reshape(*scale.shape, *[1] * (self.lora_a.ndim - scale.ndim))
        return scale * jnp.matmul(self.lora_a[...], self.lora_b[...], precision=jax.lax.Precision.HIGHEST)


class LoRALinear(LowRank):
    """A linear site: `base(x) + scale * (drop(x) A) B`, the matmuls in the base's dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        a, b = (f[...].astype(y.dtype) for f in (self.lora_a, self.lora_b))
        low = jnp.matmul(self.drop(x).astype(y.dtype), a)
        return y + widened(low * self.scale[...].astype(y.dtype), b)


class LoRAEmbed(LowRank):
    """An embedding site: `base(tokens) + scale * A[tokens] B`. There is nothing to drop: its input is an index."""

    weight = "embedding"

    def __call__(self, tokens: jax.Array) -> jax.Array:
        y = self.base(tokens)
        a, b = (f[...].astype(y.dtype) for f in (self.lora_a, self.lora_b))
        return y + widened(a[tokens] * self.scale[...].astype(y.dtype), b)

    def attend(self, query: jax.Array) -> jax.Array:
        """The base's output projection with the same weights, which LoRA on an embedding leaves as it is (so does PEFT)."""
        return self.base.attend(query)

    @property
    def embedding(self) -> nnx.Param:
        """The base's weights."""
        return self.base.embedding


class LoRAExperts(LowRank):
    """An expert site: `base(x, expert) + scale * (x A[expert]) B[expert]`, row by row. Nothing is dropped there, as in PEFT."""

    def __call__(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        y = self.base(x, expert)
        a, b = (f[...].astype(y.dtype) for f in (self.lora_a, self.lora_b))
        low = grouped_matmul(x.astype(y.dtype), a, expert)
        return y + grouped_matmul(low * self.scale[...].astype(y.dtype), b, expert)


SITE_MODULES: dict[str, type[LowRank]] = {"linear": LoRALinear, "embedding": LoRAEmbed, "expert": LoRAExperts}


class LoraSection(AdapterConfig):
    method: Literal["lora"] = Field(default="lora", description="Low-rank updates W + s A B (arXiv:2106.09685).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


class Lora(Method):
    """Low-rank updates."""

    name, section = "lora", LoraSection


METHODS.register("lora", Lora())
