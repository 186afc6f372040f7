"""Injection: replaces the modules at the sites, labels every parameter, and fills in the numbers of one member.

What is drawn depends on the member's seed, the site's name and the layer, and never on what else is in the pack: a member starts
the same alone and beside any others. NumPy draws it, so that a hundred members of different ranks compile nothing. An adapted model
also records the config of its adapter: the arrays alone do not say whether a scale of 2 is 16 / 8 or rank-stabilised.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.schema import AdapterConfig
from ..errors import InputError, nearest
from ..models.convolution import Blocks
from ..models.layers import AXES, OF_ALL_LAYERS, PER_SEGMENT, UPDATED
from ..models.quantized import QUANTIZED
from ..models.stack import Stack
from ..models.stored import StoredLinear, put
from ..parallel.mesh import to_host
from .contraction import GENERAL, flat_kernel
from .labels import FROZEN, STATISTIC, label_of
from .layout import Layout, ResolvedAdapter, ResolvedSite, SiteLayout, label_table, resolve, unite
from .methods.base import AdaptedSite
from .parameters import PARAMETER, AdapterSetting, SiteData, Statistics, variable_of
from .sites import Path, SiteModule, logical_name, modules_named, named_variables, names_of

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

    shared = {name: variable_of(name, parameter, (), {OF_ALL_LAYERS: True}) for name, parameter in layout.shared().items()}
    options: dict[str, Any] = {"method": layout.method, "dropout": layout.dropout, "shared": shared}

    def make(of: SiteLayout, base: nnx.Module) -> nnx.Module:
        return AdaptedSite(base, of.site, layers=of.layers, extent=of.extent, **options)

    adapted = replace_sites(model, layout.sites, make)
    layout.method.prepare(adapted)
    _check_saved(model, layout)
    if not _label(adapted, layout) and not layout.method.kinds:
        raise InputError(f"adapter.method: {layout.method.name}: the model has no head, so there is nothing to train.")
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
        put(parent, inner, make(of, _descend(parent, inner)))
    for path, module in nnx.iter_modules(adapted):
        if isinstance(module, Blocks):
            inside = [of.site.path[len(path)] for of in sites if of.site.path[: len(path)] == path]
            module.cut = min((module.names.index(str(name)) for name in inside), default=len(module.names))
    return adapted


def _descend(module: Any, path: Path) -> Any:
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


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
        label = label_of(name, table) if isinstance(variable, nnx.Param) else FROZEN
        if variable.get_metadata().get(UPDATED, False):
            variable.set_metadata(LABEL, STATISTIC)
            continue
        if label != FROZEN and variable.get_metadata().get(QUANTIZED, False):
            raise InputError(
                f"{name.rpartition('.')[0]}: the adapter's config trains it as it is, and its weight is quantised, which has no gradient. "
                "Leave it out of the quantisation (its key 'skip'), or train an adapter on it."
            )
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


def site_modules(model: nnx.Module) -> dict[str, AdaptedSite]:
    """Site name -> its module, of an adapted model."""
    return {logical_name(path): m for path, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite)}


Memo = dict[tuple[str, int], dict[Hashable, Any]]


def fill_member(
    model: nnx.Module,
    member: ResolvedAdapter,
    seed: int | None,
    statistics: Mapping[tuple[str, int], Statistics] | None = None,
    memo: Memo | None = None,
) -> None:
    """Sets the adapters of a model made by `inject_layout` to one member at step 0, in place.

    Args:
        model: the adapted model.
        member: what it adapts.
        seed: of the draws; None: the settings alone are set, and the arrays stay at their fill value, for those of a file.
        statistics: (site name, layer) -> what the layer saw of the data, where the member's init wants any.
        memo: (site name, layer) -> what inits remember for the pack's other members (`SiteData.once`).

    With one seed, a member of a smaller rank starts as the leading part of a larger one where the method draws rank after rank, so that
    they differ in their rank alone; with `adapter.nested_init: false` each rank has draws of its own.
    """
    modules = site_modules(model)
    memo = {} if memo is None else memo
    for name, module in modules.items():
        _fill_site(module, name, member.sites.get(name), member.config, seed, statistics or {}, memo)
    if seed is None:
        return
    shared = {module.site: int(member.sites[name].ranks.max()) for name, module in modules.items() if name in member.sites}
    if shared:
        method = member.method
        for name, value in method.init_shared(shared, member.config, random_of(seed, "adapter", 0)).items():
            variable = getattr(next(iter(modules.values())), name)
            array = np.full(variable.shape, variable.get_metadata()[PARAMETER].fill, np.float32)
            own = tuple(slice(min(n, m)) for n, m in zip(value.shape, array.shape, strict=True))  # no site needs what is beyond
            array[own] = value[own]
            variable.set_value(jnp.asarray(array))


def draw_head(model: nnx.Module, seed: int) -> None:
    """Draws a task's new head by a member's seed, each of its matrices from N(0, 0.02), in place; a head that was loaded stays."""
    for name in getattr(model, "new", ()):
        module: Any = getattr(model, name)
        module = module.base if isinstance(module, SiteModule) else module
        if isinstance(module, nnx.Linear):
            drawn = random_of(seed, name, 0).standard_normal(module.kernel.shape, np.float32)
            module.kernel.set_value(jnp.asarray(0.02 * drawn, module.kernel.dtype))


def random_of(seed: int, name: str, layer: int, *more: int) -> np.random.Generator:
    """Random numbers for a seed, name and layer: the same in every process and on every platform."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), layer, *more])))


def _fill_site(
    module: AdaptedSite,
    name: str,
    member: ResolvedSite | None,
    config: Any,
    seed: int | None,
    statistics: Mapping[tuple[str, int], Statistics],
    memo: Memo,
) -> None:
    site, method = module.site, module.method
    layers = len(module.ranks)
    first = len(site.names) - layers
    ranks = np.zeros(layers, int) if member is None else member.ranks[first:]
    padded = {n: p for n, p in method.padded(site, module.extent).items() if p.scope == "layer"}
    arrays = {n: np.full((layers, *p.shape), p.fill, np.float32) for n, p in padded.items()}
    for i in np.flatnonzero(ranks):
        if member is None or seed is None:
            break
        rank, layer = int(ranks[i]), first + int(i)
        random = random_of(seed, name, layer, *([] if config.nested_init else [rank]))
        own, seen = method.parameters(site, rank), statistics.get((name, layer), Statistics())
        numbers = {setting: float(values[layer]) for setting, values in member.settings.items()}
        data = SiteData(_weight_of(module, layer), seen, numbers, module.rank, memo.setdefault((name, layer), {}))
        for array, value in method.init(site, rank, config, random, data).items():
            arrays[array][(i, *own[array].own)] = value
    for setting in method.setting_names:
        arrays[setting] = np.zeros(layers, np.float32) if member is None else member.settings[setting][first:]
    module.fill(arrays)
    module.ranks = nnx.static(tuple(int(r) for r in ranks))
    if hasattr(module, "dropout_rate"):
        rate = np.full(module.dropout_rate.shape, config.dropout if member is not None else 0.0, np.float32)
        module.dropout_rate.set_value(jnp.asarray(rate))


def _weight_of(module: AdaptedSite, layer: int) -> Callable[[], np.ndarray]:
    """Gives one layer's weight of the base, float32 on the host."""

    def weight() -> np.ndarray:
        if isinstance(module.base, StoredLinear):
            return to_host(module.base.dense_kernel(layer if module.stacked else None)).astype(np.float32)
        whole = getattr(module.base, module.weight)[...]
        array = to_host(whole[layer] if module.stacked else whole).astype(np.float32)
        return flat_kernel(module.base, array) if isinstance(module.base, GENERAL) else array

    return weight
