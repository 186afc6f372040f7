"""Injection: replaces the modules at the sites, from outside, and labels every parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from ..config.errors import InputError, nearest
from ..config.schema import AdapterConfig
from ..models.stack import AXES, PER_SEGMENT, Stack
from .labels import FROZEN, label_of, label_table
from .modules import SITE_MODULES, AdapterSetting, LoRAParam, LowRank
from .record import remember
from .sites import Path, logical_name, modules_named, names_of
from .spec import SiteShape, Structure, resolve, unite

LABEL = "label"


def inject(model: nnx.Module, config: AdapterConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """A model with adapters on `model`'s sites; `model` itself is left as it was.

    Both share the base's arrays, so nothing is copied. With the default init the new model's outputs equal the base's, bit for bit.

    Args:
        model: any NNX model.
        config: rank, targets and so on.
        rngs: gives the seed of the factors.

    Raises:
        InputError: the model bears adapters already, or a target, layer or pattern matches nothing.

    >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> net = nnx.Sequential(layer)
    >>> adapted = inject(net, AdapterConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
    >>> adapted.layers[0].lora_a.shape
    (4, 2)
    """
    from .members import fill_member

    spec = resolve(model, config)
    adapted = inject_structure(model, unite(model, [spec]))
    fill_member(adapted, spec, int(jax.random.bits(rngs.params())))
    remember(adapted, config)
    return adapted


def inject_structure(model: nnx.Module, structure: Structure) -> nnx.Module:
    """The model with zero factors of the structure's shapes at its sites, every parameter labelled."""

    def make(shape: SiteShape, base: nnx.Module) -> nnx.Module:
        site = shape.site
        sizes = {"layers": shape.layers, "experts": site.experts, "inputs": site.inputs, "outputs": site.outputs, "rank": shape.rank}
        return SITE_MODULES[site.kind](base, **sizes, dropout=structure.dropout and site.kind != "expert")

    adapted = replace_sites(model, structure.sites, make)
    if structure.method == "head":
        # Without adapters it is the head alone that needs anything anew; the top layer stays with it, which is run for few positions.
        for _, module in nnx.iter_modules(adapted):
            if isinstance(module, Stack) and module.depth > 1:
                module.split_at(module.depth - 1)
    _check_saved(model, structure)
    _label(adapted, structure)
    if structure.method == "head" and not any(label_of(name, label_table(structure)) != FROZEN for name in _names(adapted)):
        raise InputError("adapter.method: head: the model has no classifier to train.")
    return adapted


def replace_sites(model: nnx.Module, sites: Sequence[SiteShape], make: Callable[[SiteShape, nnx.Module], nnx.Module]) -> nnx.Module:
    """A model around the same arrays, with what `make` makes of a site and its module in that module's place; `model` is left as it was."""
    graphdef, state = nnx.split(model, graph=True)
    # `tree.map` makes variables anew around the same arrays: labels set later do not reach the caller's model.
    adapted = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    for shape in sites:
        site, path = shape.site, shape.site.path
        if site.stack is not None:
            inner = path[len(site.stack) :]
            stack = _descend(adapted, site.stack)
            assert isinstance(stack, Stack) and inner[0] == "segments"
            parent, inner = stack.split_at(shape.first), inner[2:]
        else:
            parent, inner = adapted, path
        owner = _descend(parent, inner[:-1])
        _set(owner, inner[-1], make(shape, _descend(owner, inner[-1:])))
    return adapted


def _names(model: nnx.Module) -> list[str]:
    return [logical_name(path) for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]


def _descend(module: Any, path: Path) -> Any:
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def _set(owner: Any, name: str | int, module: nnx.Module) -> None:
    if isinstance(name, int):
        owner[name] = module
    else:
        setattr(owner, name, module)


def _check_saved(model: nnx.Module, structure: Structure) -> None:
    modules = dict(nnx.iter_modules(model))
    for saved in structure.modules_to_save:
        if not modules_named(model, saved):
            names = {n for path in modules for n in names_of(modules, path, "{i}")} - {""}
            endings = sorted({n.rsplit(".", 1)[-1] for n in names})
            near = nearest(saved, endings) or endings[:20]
            raise InputError(f"adapter.modules_to_save: '{saved}' matches no module. Nearest names: {', '.join(near)}.")


def _label(model: nnx.Module, structure: Structure) -> None:
    table = label_table(structure)
    whole = {id(s) for _, m in nnx.iter_modules(model) if isinstance(m, Stack) and len(m.segments) == 1 for s in m.segments}
    owned = {id(v) for _, m in nnx.iter_modules(model) if id(m) in whole for _, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)}
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Variable) or isinstance(variable, AdapterSetting):
            continue
        # A user's batch statistics and random keys are variables too, but nothing to train.
        label = label_of(logical_name(path), table) if isinstance(variable, nnx.Param | LoRAParam) else FROZEN
        variable.set_metadata(LABEL, label)
        if label != FROZEN and id(variable) in owned and variable.get_metadata().get(AXES, ("",))[0] == "layers":
            # A trained weight of the base goes through the scan as its input: its gradient is then stacked by the scan, not
            # added up layer by layer over the whole stack.
            variable.set_metadata(PER_SEGMENT, True)


def site_modules(model: nnx.Module) -> dict[str, LowRank]:
    """Site name -> its module, of an adapted model."""
    return {logical_name(path): m for path, m in nnx.iter_modules(model) if isinstance(m, LowRank)}
