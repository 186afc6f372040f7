"""Muon (https://kellerjordan.github.io/posts/muon): a matrix's momentum, its singular values brought near 1 by five Newton-Schulz steps.

An update is scaled by `rms sqrt(max(rows, columns))` (arXiv:2502.16982): its root mean square is then about that of AdamW's updates, and
learning rates carry over. What is no matrix is updated by AdamW; so are the head and what lies along the vocabulary, as in Muon's own
experiments. Each layer and each expert is a matrix of its own.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from pydantic import Field

from ...config.schema import OptimizerConfig
from ...config.types import Fraction, PositiveFloat
from .base import Group, Optimizer, register_optimizer


class MuonSection(OptimizerConfig):
    kind: Literal["muon"] = Field(default="muon", description="Muon, momentum made orthogonal; AdamW for what is no matrix.")
    momentum: Fraction = Field(default=0.95, description="Decay of the momentum (Nesterov's).")
    rms: PositiveFloat = Field(default=0.2, description="Root mean square of a matrix's update, before the learning rate.")
    b1: Fraction = Field(default=0.9, description="AdamW's decay of the first moment.")
    b2: Fraction = Field(default=0.999, description="AdamW's decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's eps.")


class Muon(Optimizer):
    name, section = "muon", MuonSection
    shaped = True

    def group(self, of: Group) -> optax.GradientTransformation:
        numbers = of.numbers

        def scaled(updates: Any, _: Any) -> Any:
            def one(path: Any, update: jax.Array) -> jax.Array:
                longest = of.shape(path[-1].key, update)[..., -2:].max(-1)
                return update * numbers["rms"] * jnp.sqrt(longest).reshape(*longest.shape, *[1] * (update.ndim - longest.ndim))

            return jax.tree_util.tree_map_with_path(one, updates)

        by_column = lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree)
        matrix = optax.chain(
            scale_by_muon(beta=numbers["momentum"], weight_dimension_numbers=by_column),
            optax.stateless(scaled),
            optax.add_decayed_weights(of.weight_decay, of.decayed),
            optax.scale_by_learning_rate(of.learning_rate),
        )
        b1, b2, eps = (numbers[name] for name in ("b1", "b2", "eps"))
        other = optax.adamw(of.learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=of.weight_decay, mask=of.decayed)
        return optax.multi_transform({"matrix": matrix, "other": other}, lambda params: _kinds(of, params))


def _kinds(of: Group, params: Any) -> Any:
    def one(path: Any, array: jax.Array) -> str:
        name = path[-1].key
        own = name in of.part.parameters or (of.part.labels[name] != "head" and "vocab" not in of.part.axes.get(name, ()))
        return "matrix" if own and of.axes(name, array) >= 2 else "other"

    return jax.tree_util.tree_map_with_path(one, params)


register_optimizer("muon", Muon())
