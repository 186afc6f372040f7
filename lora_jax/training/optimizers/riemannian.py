"""Riemannian preconditioning of LoRA's pair of factors (arXiv:2402.02347), before AdamW ("scaled AdamW").

The change of the weight is `s A B`, A (in, r) and B (r, out). A's gradient is multiplied by `(B B^T + delta I)^-1` from the right, B's by
`(A^T A + delta I)^-1` from the left: a step of the product then depends on the product alone, and not on how its size is shared between
the two. Arrays that are in no such pair are updated by plain AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ...adapters.layout import Layout
from ...adapters.parameters import Parameter
from ...adapters.partition import Arrays, Partition
from ...config.types import PositiveFloat
from ...errors import InputError
from .adamw import AdamW, AdamWSection
from .base import register_optimizer


class RiemannianSection(AdamWSection):
    kind: Literal["riemannian"] = Field(default="riemannian", description="AdamW over a preconditioned pair of factors (arXiv:2402.02347).")
    delta: PositiveFloat = Field(default=1e-6, description="Added to the diagonal of the matrices that are inverted.")


class Riemannian(AdamW):
    name, section = "riemannian", RiemannianSection

    def check(self, layout: Layout) -> None:
        lacking = [of.site.name for of in layout.sites if _pair(layout.method.padded(of.site, of.extent)) is None]
        if lacking or not layout.sites:
            raise InputError(
                f"optimizer.kind: '{self.name}' preconditions a pair of trained factors A and B, and adapter.method: "
                f"'{layout.method.name}' has none{f' at {lacking[0]}' if lacking else ''}."
            )

    def preconditioned(self, gradients: Arrays, trainable: Arrays, part: Partition, numbers: Mapping[str, jax.Array]) -> Arrays:
        sites: dict[str, dict[str, Parameter]] = {}
        for own in part.parameters.values():
            sites.setdefault(own.site, {})[own.name] = own.parameter
        found = dict(gradients)
        for site, parameters in sites.items():
            if (pair := _pair(parameters)) is not None:
                a, b = (f"{site}.{name}" for name in pair)
                found[a] = jnp.swapaxes(_solved(trainable[b], jnp.swapaxes(gradients[a], -1, -2), numbers["delta"]), -1, -2)
                found[b] = _solved(jnp.swapaxes(trainable[a], -1, -2), gradients[b], numbers["delta"])
        return found


def _pair(parameters: Mapping[str, Parameter]) -> tuple[str, str] | None:
    """The names of a site's A (..., inputs, rank) and B (..., rank, outputs), if it trains just one such pair."""
    labelled = [[n for n, p in parameters.items() if p.trained and p.label == label] for label in ("adapter_a", "adapter_b")]
    if [len(names) for names in labelled] != [1, 1]:
        return None
    (a,), (b,) = labelled
    shapes = parameters[a].shape, parameters[b].shape
    fits = len(shapes[0]) == len(shapes[1]) >= 2 and shapes[0][-1] == shapes[1][-2] and shapes[0][:-2] == shapes[1][:-2]
    return (a, b) if fits and parameters[a].scope == parameters[b].scope == "layer" else None


def _solved(rows: jax.Array, gradient: jax.Array, delta: jax.Array) -> jax.Array:
    """`(R R^T + delta I)^-1 G` of R, G (..., rank, n); where both are 0, as in the padding, it is 0."""
    product = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.solve(product + delta * jnp.eye(rows.shape[-2]), gradient)


register_optimizer("riemannian", Riemannian())
