"""Injection: replaces the modules at the sites, from outside, and labels every parameter.

An adapted model also keeps a record of the config its adapter came from, so that the adapter can be written as it was asked for: the
arrays alone do not say whether a scale of 2 is 16 / 8 or rank-stabilised, or that the targets were `all-linear`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from ..config.schema import AdapterConfig
from ..errors import InputError, nearest
from ..models.layers import AXES, PER_SEGMENT
from ..models.stack import Stack
from .labels import FROZEN, label_of
from .layout import Layout, SiteLayout, label_table, resolve, unite
from .members import fill_member
from .methods.base import AdaptedSite, AdapterParam, AdapterSetting
from .sites import Path, modules_named, named_variables, names_of

# Metadata key of a variable's label.
LABEL = "label"


def inject(model: nnx.Module, config: AdapterConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """A copy of `model` with adapters at its sites. `model` itself is unchanged.

    Both models share the base's arrays; no weight is copied. With the default init the new model's outputs equal the base's, bit
    for bit.

    Args:
        model: any NNX model.
        config: rank, targets and so on.
        rngs: gives the seed of the adapter's arrays.

    Raises:
        InputError: the model has adapters already, or a target, layer or pattern matches nothing.

    >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> net = nnx.Sequential(layer)
    >>> adapted = inject(net, AdapterConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
    >>> adapted.layers[0].lora_a.shape
    (4, 2)
    """
    resolved = resolve(model, config)
    adapted = inject_layout(model, unite(model, [resolved]))
    fill_member(adapted, resolved, int(jax.random.bits(rngs.params())))
    remember(adapted, config)
    return adapted


def inject_layout(model: nnx.Module, layout: Layout) -> nnx.Module:
    """The model with adapters of the layout's shapes at its sites, all at their fill values, every parameter labelled.

    Raises:
        InputError: `modules_to_save` names no module, or there is nothing to train.
    """

    def make(of: SiteLayout, base: nnx.Module) -> nnx.Module:
        return AdaptedSite(base, of.site, layers=of.layers, rank=of.rank, method=layout.method, dropout=layout.dropout)

    adapted = replace_sites(model, layout.sites, make)
    layout.method.prepare(adapted)
    _check_saved(model, layout)
    if not _label(adapted, layout) and not layout.method.kinds:
        raise InputError(f"adapter.method: {layout.method.name}: the model has nothing that it would train (no head).")
    return adapted


def replace_sites(model: nnx.Module, sites: Sequence[SiteLayout], make: Callable[[SiteLayout, nnx.Module], nnx.Module]) -> nnx.Module:
    """A model around the same arrays, with what `make` makes of a site and its module in that module's place; `model` is left as it was."""
    graphdef, state = nnx.split(model, graph=True)
    # `tree.map` makes variables anew around the same arrays: labels set later do not reach the caller's model.
    adapted = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    for of in sites:
        site, path = of.site, of.site.path
        if site.stack is not None:
            inner = path[len(site.stack) :]
            stack = _descend(adapted, site.stack)
            assert isinstance(stack, Stack) and inner[0] == "segments"
            parent, inner = stack.split_at(of.first), inner[2:]
        else:
            parent, inner = adapted, path
        owner = _descend(parent, inner[:-1])
        set_child(owner, inner[-1], make(of, _descend(owner, inner[-1:])))
    return adapted


def _descend(module: Any, path: Path) -> Any:
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def set_child(owner: Any, name: str | int, module: nnx.Module) -> None:
    """Puts a module in another's place, in a list or as an attribute."""
    if isinstance(name, int):
        owner[name] = module
    else:
        setattr(owner, name, module)


def _check_saved(model: nnx.Module, layout: Layout) -> None:
    modules = dict(nnx.iter_modules(model))
    for saved in layout.modules_to_save:
        if not modules_named(model, saved):
            names = {n for path in modules for n in names_of(modules, path, "{i}")} - {""}
            endings = sorted({n.rsplit(".", 1)[-1] for n in names})
            near = nearest(saved, endings) or endings[:20]
            raise InputError(f"adapter.modules_to_save: '{saved}' matches no module. Nearest names: {', '.join(near)}.")


def _label(model: nnx.Module, layout: Layout) -> bool:
    """Labels all variables, in place; returns whether any trains."""
    table, trains = label_table(layout), False
    uncut = {id(s) for _, m in nnx.iter_modules(model) if isinstance(m, Stack) and len(m.segments) == 1 for s in m.segments}
    owned = {id(v) for _, m in nnx.iter_modules(model) if id(m) in uncut for _, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)}
    for name, variable in named_variables(model):
        if isinstance(variable, AdapterSetting):
            continue
        # A user's batch statistics and random keys are variables too, but nothing to train.
        label = label_of(name, table) if isinstance(variable, nnx.Param | AdapterParam) else FROZEN
        variable.set_metadata(LABEL, label)
        trains |= label != FROZEN
        if label != FROZEN and id(variable) in owned and variable.get_metadata().get(AXES, ("",))[0] == "layers":
            # A trained weight of the base goes through the scan as its input: its gradient is then stacked by the scan, not
            # added up layer by layer over all of the stack.
            variable.set_metadata(PER_SEGMENT, True)
    return trains


_ATTRIBUTE = "adapter_record"


@dataclasses.dataclass(frozen=True)
class Record:
    """All text, so that it can be part of a model's static structure.

    Attributes:
        config: `AdapterConfig`, as JSON.
        foreign: what else the file that it was loaded from said, as JSON; empty for an adapter made here.
    """

    config: str
    foreign: str = ""


def remember(model: nnx.Module, config: AdapterConfig, foreign: str = "") -> None:
    """Sets the record at the root of an adapted model, in place of any earlier one."""
    owner: Any = model
    setattr(owner, _ATTRIBUTE, nnx.static(Record(config.model_dump_json(), foreign)))


def recall(model: nnx.Module) -> Record | None:
    """The record, at the root or at a module that another now wraps."""
    return next((r for _, m in nnx.iter_modules(model) if (r := getattr(m, _ATTRIBUTE, None)) is not None), None)
