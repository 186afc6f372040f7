"""Injection: replaces the modules at the sites, from outside, and labels every parameter.

What an adapted model remembers of where its adapter came from, so that it can be written as it was asked for.

The arrays alone say what the model computes, but not how it was put: whether a scale of 2 is 16 / 8 or rank-stabilised, or that the
targets were `all-linear`.

One member's numbers in a structure: its factors (initialised by its own seed and padded), scales and dropout rates.

What is drawn depends on the member's seed, the site's name and the layer, and never on what else is in the pack: a member starts
the same alone and in any company. Rank after rank is drawn: of two members with one seed the smaller starts as the leading part of
the larger, so that they differ in their rank alone (`adapter.nested_init`). NumPy draws it, so that a hundred members of different
ranks compile nothing.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.schema import AdapterConfig
from ..errors import InputError, nearest
from ..models.layers import AXES, PER_SEGMENT
from ..models.stack import Stack
from .labels import FROZEN, label_of, label_table
from .layout import MemberSite, MemberSpec, SiteShape, Structure, resolve, unite
from .methods.lora import SITE_MODULES, AdapterSetting, LoRAEmbed, LoRAParam, LowRank
from .sites import Path, logical_name, modules_named, names_of

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


_ATTRIBUTE = "adapter_record"


@dataclasses.dataclass(frozen=True)
class Record:
    """All text, so that it can be part of a model's structure.

    Attributes:
        config: `AdapterConfig`, as JSON.
        foreign: what else the file that it was loaded from said, as JSON; empty for an adapter made here.
    """

    config: str
    foreign: str = ""


def remember(model: nnx.Module, config: AdapterConfig, foreign: str = "") -> None:
    """Notes at the root of an adapted model what its adapter is, in place of any earlier note."""
    owner: Any = model
    setattr(owner, _ATTRIBUTE, nnx.static(Record(config.model_dump_json(), foreign)))


def recall(model: nnx.Module) -> Record | None:
    """What was noted, at the root or at a module that another now wraps."""
    return next((r for _, m in nnx.iter_modules(model) if (r := getattr(m, _ATTRIBUTE, None)) is not None), None)


def fill_member(model: nnx.Module, spec: MemberSpec, seed: int) -> None:
    """Sets the adapters of a model made by `inject_structure` to one member at step 0, in place.

    The default init is PEFT's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0 (kaiming_uniform with a = sqrt 5); at an
    embedding A = 0 and B ~ N(0, 1). Each expert draws its own.
    """
    for name, module in site_modules(model).items():
        _fill_site(module, name, spec.sites.get(name), spec.config, seed)


def draw_head(model: nnx.Module, seed: int) -> None:
    """Draws a task's new head by a member's seed, each of its matrices from N(0, 0.02), in place; a head that was loaded stays."""
    new = getattr(model, "new", ())
    for path, variable in nnx.iter_graph(model):
        module, _, parameter = logical_name(path).rpartition(".")
        if isinstance(variable, nnx.Param) and parameter == "kernel" and module in new:
            drawn = random_of(seed, module, 0).standard_normal(variable.shape, np.float32)
            variable.set_value(jnp.asarray(0.02 * drawn, variable.dtype))


def random_of(seed: int, name: str, layer: int, *more: int) -> np.random.Generator:
    """Random numbers for a seed, name and layer: the same in every process and on every platform."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), layer, *more])))


def _fill_site(module: LowRank, name: str, member: MemberSite | None, config: AdapterConfig, seed: int) -> None:
    stacked = module.scale.ndim == 1
    a, b = (np.zeros(f.shape if stacked else (1, *f.shape), np.float32) for f in (module.lora_a, module.lora_b))
    scale, experts = np.zeros(len(a), np.float32), a.shape[1:-2]
    if member is not None:
        first = len(member.ranks) - len(a)
        for i, (rank, layer_scale) in enumerate(zip(member.ranks[first:], member.scales[first:], strict=True)):
            generator = random_of(seed, name, first + i, *([] if config.nested_init else [rank]))
            scale[i] = layer_scale
            if isinstance(module, LoRAEmbed):
                b[i, :rank] = generator.standard_normal((rank, b.shape[2]), np.float32)
            else:
                bound = np.float32(1 / np.sqrt(a.shape[-2]))
                drawn = 2 * generator.random((rank, *experts, a.shape[-2]), np.float32) - 1
                a[i, ..., :rank] = np.moveaxis(drawn, 0, -1) * bound
    for variable, value in ((module.lora_a, a), (module.lora_b, b), (module.scale, scale)):
        variable.set_value(jnp.asarray(value if stacked else value[0]))
    if hasattr(module, "dropout_rate"):
        rate = np.full(module.dropout_rate.shape, config.dropout if member is not None else 0.0, np.float32)
        module.dropout_rate.set_value(jnp.asarray(rate))
