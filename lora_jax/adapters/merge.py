"""Merging: folds each adapter into its weight, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.types import size_text
from ..errors import warn
from ..models.encoder_decoder import Generative
from ..models.quantized import Held, quantized
from ..models.stored import Stored, dense, put, weight_shape
from .contraction import GENERAL, own_kernel
from .inject import recall, remember
from .methods.base import AdaptedSite


class Merged(nnx.Module):
    """A site whose adapter is folded into its weight; keeps what it was made of, so that unmerging gives the same bits."""

    def __init__(self, merged: nnx.Module, original: AdaptedSite):
        self.merged = merged
        self.original: Any = original

    def __call__(self, *inputs: jax.Array, **options: Any) -> jax.Array:
        return self.merged(*inputs, **options)

    def attend(self, query: jax.Array) -> jax.Array:
        """The output projection with the base's weight, as unmerged."""
        return self.original.attend(query)

    def projection(self) -> Callable[[jax.Array], jax.Array]:
        """Likewise, as `models.layers.Embedding` has it."""
        return self.original.projection()

    @property
    def embedding(self) -> nnx.Param:
        """The base's weights, as unmerged."""
        return self.original.embedding


def merge(model: nnx.Module, *, keep_mask: bool = False) -> nnx.Module:
    """A model that computes with one weight at every site, `W + scale * A B` for LoRA. `model` itself is unchanged.

    The weight is computed in float32 and rounded once to its dtype. A stacked weight keeps all its layers; those without an adapter
    are equal to the base's. A layer whose weight the base holds in another form (`StoredLinear`) becomes a dense one, which is said.

    Args:
        model: an adapted model.
        keep_mask: whether what is 0 in the base's weight, as pruning leaves it, stays 0: the adapter's change of it is lost, and the
            merged model computes something else than the adapted one.

    >>> from lora_jax.config.schema import AdapterConfig
    >>> from lora_jax.adapters.inject import inject
    >>> net = inject(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), AdapterConfig(targets="all-linear"), rngs=nnx.Rngs(1))
    >>> type(unmerge(merge(net)).layers[0]).__name__
    'AdaptedSite'
    """
    _say_dense(model)
    return _replace(model, AdaptedSite, lambda module: Merged(_folded(module, keep_mask), module))


def unmerge(model: nnx.Module) -> nnx.Module:
    """The model that was given to `merge`: its base weights and adapters, bit for bit."""
    return _replace(model, Merged, lambda module: module.original)


def plain(model: nnx.Module, *, shifted: bool = False) -> nnx.Module:
    """A model that computes the same with adapters of forms that other programs know (`Method.plain`), for export.

    Args:
        model: an adapted model.
        shifted: whether the base's weights may change for it: what an adapter's init took out of them is then missing there.

    Returns:
        the model itself where all of it has such a form already.
    """
    record = recall(model)
    method = next((m.method for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite)), None)
    if method is None:
        return model
    known = record is not None and json.loads(record.config)["method"] == method.name
    section = method.section.model_validate(json.loads(record.config) if known and record is not None else {})
    sections = []

    def make(module: AdaptedSite) -> nnx.Module:
        found = module.method.plain(module, section, module.base_arrays()[0] if shifted else None)
        if found is None:
            return module
        base: Any = copy_of(module.base)
        if found.weight is not None:
            base = dense(base)
            _set_top(getattr(base, module.weight), _own(base, found.weight))
        layers, extent = len(module.ranks) if module.stacked else None, tuple(rank * found.times for rank in module.extent)
        new = AdaptedSite(base, module.site, layers=layers, extent=extent, method=found.method, dropout=hasattr(module, "dropout_rate"))
        for name, value in found.arrays.items():
            getattr(new, name).set_value(value)
        new.ranks, new.deterministic = nnx.static(tuple(rank * found.times for rank in module.ranks)), module.deterministic
        if hasattr(new, "dropout_rate"):
            new.dropout_rate.set_value(module.dropout_rate[...])
        sections.append(found.config)
        return new

    changed = _replace(model, AdaptedSite, make)
    if not sections:
        return model
    if known and record is not None:
        remember(changed, sections[0], record.foreign)
    return changed


def strip(model: nnx.Module) -> nnx.Module:
    """The model without its adapters: the base's own modules at every site. What else was trained stays as it is."""
    return _replace(model, AdaptedSite, lambda module: module.base)


def merged_base(model: nnx.Module, *, keep_mask: bool = False, requantize: bool = False) -> nnx.Module:
    """A plain model, of the same classes as the base, with the merged weights: for export. Keeps no adapters.

    An adapter on an embedding leaves the vocabulary projection as it is, so a projection tied to a merged embedding gets weights of its
    own. `keep_mask` as in `merge`.

    Args:
        model: an adapted model.
        requantize: whether a weight that the base holds quantised is so again, in the same format: it is then not quite the merged one.

    Raises:
        InputError: nothing here quantises to the format that the base came in.
    """
    if not requantize:
        _say_dense(model)
    copy = copy_of(model)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Generative) and module.config.tied and isinstance(module.embed, AdaptedSite | Merged):
            module.untie()
    copy = _replace(copy, Merged, lambda module: module.merged)  # `save_pretrained(merge(model))`, as PEFT's users write
    return _replace(copy, AdaptedSite, lambda module: _folded(module, keep_mask, requantize))


def quantised_sites(model: nnx.Module) -> list[AdaptedSite]:
    """The adapted sites whose weight the base holds quantised."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite) and isinstance(m.base, Held)]


def _say_dense(model: nnx.Module) -> None:
    """Says how much larger a model gets because layers are merged that its base holds in another form."""
    sites = [m for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite) and isinstance(m.base, Stored)]
    if sites:
        held = sum(v.get_value().nbytes for m in sites for _, v in nnx.iter_graph(m.base) if isinstance(v, nnx.Variable))
        whole = sum(math.prod(weight_shape(m.base, m.weight)) * np.dtype(m.base.dtype).itemsize for m in sites)
        into = "the dequantised ones that the adapter was trained on, " if quantised_sites(model) else ""
        warn(f"merging: {size_text(held)} of the base's weights, held in another form, become {into}{size_text(whole)} of dense ones.")


def merged_arrays(module: AdaptedSite) -> tuple[jax.Array, jax.Array | None]:
    """The merged weight and bias of the layers that a site has arrays for, float32."""
    return module.method.merged(module, *module.base_arrays())


def _folded(module: AdaptedSite, keep_mask: bool, requantize: bool = False) -> nnx.Module:
    folded: Any = dense(copy_of(module.base))
    weight, bias = merged_arrays(module)
    if keep_mask:
        weight = jnp.where(module.base_arrays()[0] == 0, 0, weight)
    _set_top(getattr(folded, module.weight), _own(folded, weight))
    if bias is not None:
        _set_top(folded.bias, bias)
    return quantized(folded, module.base.form) if requantize and isinstance(module.base, Held) else folded


def _own(base: Any, weight: jax.Array) -> jax.Array:
    """A weight (..., inputs, outputs) in the axes that a base's module has."""
    return own_kernel(base, weight) if isinstance(base, GENERAL) else weight


def _set_top(variable: nnx.Variable, layers: jax.Array) -> None:
    """Sets the topmost layers of a base's array, or all of it, rounded to its dtype."""
    whole = variable[...]
    layers = layers.astype(whole.dtype)
    layers = layers.reshape(whole.shape if layers.size == whole.size else (layers.shape[0], *whole.shape[1:]))
    below = whole.shape[0] - layers.shape[0]
    variable[...] = jnp.concatenate([whole[:below], layers]) if below else layers


def copy_of(model: nnx.Module) -> nnx.Module:
    """New modules and variables around the same arrays: what is set in one is not seen in the other."""
    graphdef, state = nnx.split(model, graph=True)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a, state))


def _replace(model: nnx.Module, kind: type, make: Callable[[Any], nnx.Module]) -> nnx.Module:
    copy = copy_of(model)
    for _, module in list(nnx.iter_modules(copy)):
        for name, child in list(_children(module)):
            if isinstance(child, kind) and not isinstance(module, Merged):
                put(module, (name,), make(child))
    return copy


def _children(module: nnx.Module) -> list[tuple[Any, nnx.Module]]:
    return [(name, child) for name, child in nnx.iter_children(module) if isinstance(child, nnx.Module)]
