"""Merging: folds each update into its weight, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..models.decoder import Decoder
from .methods.lora import LowRank


class Merged(nnx.Module):
    """A site whose update is folded into its weight; keeps what it was made of, so that unmerging gives the same bits."""

    def __init__(self, merged: nnx.Module, original: LowRank):
        self.merged = merged
        self.original: Any = original

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return self.merged(*inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """The output projection with the base's weight, as unmerged."""
        return self.original.attend(query)

    @property
    def embedding(self) -> nnx.Param:
        """The base's weights, as unmerged."""
        return self.original.embedding


def merge(model: nnx.Module) -> nnx.Module:
    """A model that computes `W + scale * A B` as one weight at every site. `model` is left as it was.

    The sum is taken in float32 and rounded once to the weight's dtype. In a stack whose lower layers have no adapters the weight
    holds all layers still; those below are the base's own.

    >>> from lora_jax.config.schema import AdapterConfig
    >>> from lora_jax.adapters.inject import inject
    >>> net = inject(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), AdapterConfig(targets="all-linear"), rngs=nnx.Rngs(1))
    >>> type(unmerge(merge(net)).layers[0]).__name__
    'LoRALinear'
    """
    return _replace(model, LowRank, lambda module: Merged(_folded(module), module))


def unmerge(model: nnx.Module) -> nnx.Module:
    """The model that `merge` was given: base weights and factors, bit for bit."""
    return _replace(model, Merged, lambda module: module.original)


def strip(model: nnx.Module) -> nnx.Module:
    """The model without its adapters: the base's own modules at every site. What else was trained stays as it is."""
    return _replace(model, LowRank, lambda module: module.base)


def merged_base(model: nnx.Module) -> nnx.Module:
    """A plain model, of the same classes as the base, with the merged weights: for export. Keeps no factors.

    LoRA on an embedding leaves the vocabulary projection as it is, so a projection tied to a merged embedding gets weights of its own.
    """
    copy = copy_of(model)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Decoder) and module.config.tied and isinstance(module.embed, LowRank):
            module.untie()
    return _replace(copy, LowRank, _folded)


def _folded(module: LowRank) -> nnx.Module:
    folded: Any = copy_of(module.base)
    weight = folded.kernel if hasattr(folded, "kernel") else folded.embedding
    update = module.update()
    full = weight[...]
    if module.scale.ndim and update.shape[0] != full.shape[0]:
        update = jnp.concatenate([jnp.zeros((full.shape[0] - update.shape[0], *full.shape[1:]), update.dtype), update])
    weight[...] = (full.astype(jnp.float32) + update).astype(full.dtype)
    return folded


def copy_of(model: nnx.Module) -> nnx.Module:
    """New modules and variables around the same arrays: what is set in one is not seen in the other."""
    graphdef, state = nnx.split(model, graph=True)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a, state))


def _replace(model: nnx.Module, kind: type, make: Callable[[Any], nnx.Module]) -> nnx.Module:
    copy = copy_of(model)
    module: Any
    for _, module in list(nnx.iter_modules(copy)):
        for name, child in list(_children(module)):
            if isinstance(child, kind) and not isinstance(module, Merged):
                new = make(child)
                if isinstance(name, int):
                    module[name] = new
                else:
                    setattr(module, name, new)
    return copy


def _children(module: nnx.Module) -> list[tuple[Any, nnx.Module]]:
    return [(name, child) for name, child in nnx.iter_children(module) if isinstance(child, nnx.Module)]
