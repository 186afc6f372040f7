"""Members over one model: adapters of several ranks, targets and seeds, stacked for `jax.vmap`; and each one's own part of the arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from ..config.schema import AdapterConfig
from ..errors import InputError
from .inject import fill_member, inject_layout, remember
from .layout import Layout, ResolvedAdapter, resolve, unite
from .partition import Arrays, Partition, partition, stack_members, update_mask

# An index into one array of a member; None: the member uses no part of the array.
Window = tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class Members:
    """Members over one base, for a training loop of one's own; each array has a leading axis of them.

    Attributes:
        base: the model without adapters.
        parts: the model with adapters that have room for every member; `parts.frozen` is the base, which all share.
        trainable: (members, ...) float32 by name.
        settings: (members, ...) untrained numbers by name: scales, dropout rates.
        masks: (members, ...) by name, 1 where a member trains a number: what gradients and updates are to be multiplied by. Empty where
            padding stays as it is by itself, as with LoRA.
        specs: what each member adapts.
        layout: what holds them all.
    """

    base: nnx.Module
    parts: Partition
    trainable: Arrays
    settings: Arrays
    masks: Arrays
    specs: Sequence[ResolvedAdapter]
    layout: Layout

    def model(self, number: int, trainable: Arrays | None = None) -> nnx.Module:
        """One member's model, without padding, as `inject` would give it.

        Args:
            number: of the member.
            trainable: (members, ...) what they have been trained to; step 0 by default.
        """
        spec = self.specs[number]
        adapted = inject_layout(self.base, unite(self.base, [spec]))
        fill_member(adapted, spec, None)
        remember(adapted, spec.config)
        alone, windows = partition(adapted), own_windows(self.base, self.parts, self.layout, spec)
        held = self.parts.kept(self.settings) | (self.trainable if trainable is None else trainable)
        own = {name: array[number][window] for name, array in held.items() if (window := windows[name]) is not None}
        trained = {name: own[name] for name in alone.trainable}
        return alone.merge(trained, {name: own.get(name, a) for name, a in alone.settings.items()}, alone.frozen, training=False)


def inject_members(model: nnx.Module, configs: Sequence[AdapterConfig], *, seeds: int | Sequence[int] = 0) -> Members:
    """Several adapters over one model, to be trained together by `jax.vmap` over their arrays. `model` itself is unchanged.

    Members may differ in rank, alpha, targets, layers, dropout and seed: smaller ones are padded, and train as they do alone.

    Args:
        model: any NNX model.
        configs: one a member.
        seeds: one a member, or one for all: members of different ranks then start alike (`nested_init`).

    Raises:
        InputError: there is no member, or not one seed a member; members differ in method, bias or modules_to_save; or as `inject`.

    >>> from lora_jax.config.schema import AdapterConfig
    >>> net = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> members = inject_members(net, [AdapterConfig(rank=r, targets="all-linear") for r in (1, 2)])
    >>> members.trainable["layers.0.lora_a"].shape
    (2, 4, 2)
    """
    numbers = [seeds] * len(configs) if isinstance(seeds, int) else list(seeds)
    if not configs or len(numbers) != len(configs):
        raise InputError(f"{len(configs)} configs and {len(numbers)} seeds: there must be a config or more, and a seed for each.")
    specs = [resolve(model, config) for config in configs]
    try:
        layout = unite(model, specs)
    except ValueError as error:
        raise InputError(f"{error}: they cannot be trained together.") from None
    adapted = inject_layout(model, layout)
    parts, members, memo = partition(adapted), [], {}
    for spec, seed in zip(specs, numbers, strict=True):
        fill_member(adapted, spec, seed, None, memo)
        filled = partition(adapted)
        members.append((filled.trainable, filled.settings, update_mask(parts, spec, layout) or {}))
    trainable, settings, masks = (stack_members(parts, None, column) for column in zip(*members, strict=True))
    return Members(model, parts, trainable, settings, masks, specs, layout)


def own_windows(model: nnx.Module, part: Partition, structure: Layout, member: ResolvedAdapter) -> dict[str, Window]:
    """The index of a member's own part in each array that it trains or keeps, without the member axis; None if it has no part in it.

    The rest is padding: ranks beyond the member's own, layers below its lowest.

    Args:
        model: without adapters.
        part: with adapters of `structure`, which holds the member.
    """
    layout = unite(model, [member])
    own, method, common = {s.site.name: s for s in layout.sites}, layout.method, layout.shared()
    shared = {s.site.name: s for s in structure.sites}
    found: dict[str, Window] = {}
    for name in dict.fromkeys((*part.labels, *part.parameters)):
        if (array := part.parameters.get(name)) is None:
            found[name] = (...,)
        elif not array.site:
            found[name] = common[array.name].own if array.name in common else None
        elif (alone := own.get(array.site)) is None:
            found[name] = None
        else:
            layers = () if alone.layers is None else (slice(alone.first - shared[array.site].first, None),)
            found[name] = (*layers, *method.padded(alone.site, alone.extent)[array.name].own)
    return found
