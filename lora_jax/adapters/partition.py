"""Splits an adapted model into what the compiled step takes: trainable, settings and frozen arrays, as plain dicts by name.

The sharding of a pack's arrays follows from the weight at a site. An axis of a method's parameter is sharded like the weight's axis that
it matches (`Parameter.axes`), and replicated if it matches none. A trained weight of the base keeps its sharding. Optimizer state is
sharded like the array it belongs to. All of these arrays have the members on their first axis, sharded along the mesh's `sweep` axis. If
the number of members is not divisible by that axis, they are replicated, and a step pads them with repeated members (`even_members`).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..errors import InputError
from ..models.layers import AXES
from ..models.stored import weight_axes, weight_shape
from ..parallel.constraints import gathered, looked_up
from ..parallel.mesh import AnyMesh, parameter_sharding, place
from .inject import LABEL
from .labels import FROZEN, STATISTIC
from .layout import Layout, ResolvedAdapter, SiteLayout
from .merge import Merged, strip
from .methods.base import AdaptedSite, Method
from .parameters import PARAMETER, PARAMETER_NAME, AdapterSetting, DropoutKey, Parameter, SiteArrays, largest, own_name
from .sites import Site, adapted_paths, logical_name, parameter_name

Arrays = dict[str, jax.Array]
# Begins the names, among the frozen arrays, of what the base's own weights are that train.
ORIGINAL = "original:"


@dataclasses.dataclass(frozen=True)
class SiteArray:
    """An array of a method, and its site.

    Attributes:
        site: name of its site; empty for an array that all sites share.
        name: what the method calls it.
        parameter: what the method says of it.
        shape, axes: of the base's weight there, and its logical ones; none for an array that all sites share.
    """

    site: str
    name: str
    parameter: Parameter
    shape: tuple[int, ...] = ()
    axes: tuple[str | None, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Partition:
    """An adapted model in parts: static structure, and dicts of arrays by name.

    Attributes:
        graphdef: the structure for training.
        eval_graphdef: the structure for evaluation (no dropout).
        paths: name -> path of the variable in the model. Names are dotted, and contain a layer index only where layers are not stacked.
        labels: name of a trainable array -> its label.
        axes: name -> the array's logical axes, for arrays whose axes are named.
        parameters: name -> its site and `Parameter`, for the arrays of methods (in `trainable`, or in `settings` if they are not trained).
        dropout_keys: names of the settings that are dropout keys.
        method: of the adapted sites; None where there are none.
        adapted: names of the adapted sites.
        trainable: float32 arrays that are differentiated; and running statistics (label `statistic`), which a forward pass updates.
        settings: untrained numbers of a member (scales, dropout rates).
        frozen: everything else, which is the base.
    """

    graphdef: nnx.GraphDef[Any]
    eval_graphdef: nnx.GraphDef[Any]
    paths: dict[str, tuple[Any, ...]]
    labels: dict[str, str]
    axes: dict[str, tuple[str | None, ...]]
    parameters: dict[str, SiteArray]
    dropout_keys: tuple[str, ...]
    method: Method | None
    adapted: tuple[str, ...]
    trainable: Arrays
    settings: Arrays
    frozen: Arrays

    def merge(self, trainable: Arrays, settings: Arrays, frozen: Arrays, *, training: bool) -> nnx.Module:
        """The model with these arrays. On a mesh, sharded arrays are gathered, except stacks, which gather one layer at a time."""
        parts = (trainable, settings, frozen)
        named = (item for part in parts for item in part.items() if not item[0].startswith(ORIGINAL))
        flat = [(self.paths[name], self._at_hand(name, value)) for name, value in named]
        return nnx.merge(self.graphdef if training else self.eval_graphdef, nnx.from_flat_state(flat))

    def with_originals(self) -> Partition:
        """The same with the base's own values of what trains of it among the frozen arrays: what `base` needs, for all members once."""
        own = {f"{ORIGINAL}{name}": array for name, array in self.trainable.items() if name not in self.parameters}
        return dataclasses.replace(self, frozen=self.frozen | own)

    def base(self, trainable: Arrays, settings: Arrays, frozen: Arrays) -> nnx.Module:
        """The model that the members adapt, for evaluation: no adapters, and the base's own weights (`with_originals`)."""
        own = {name.removeprefix(ORIGINAL): array for name, array in frozen.items() if name.startswith(ORIGINAL)}
        return strip(self.merge(trainable | own, settings, frozen, training=False))

    def kept(self, settings: Arrays) -> Arrays:
        """Of the settings those that are arrays of the method: what a member started with and does not train, but is part of it."""
        return {name: array for name, array in settings.items() if name in self.parameters}

    def sites(self, trainable: Arrays, settings: Arrays) -> dict[str, SiteArrays]:
        """Site name -> its arrays and settings, what `Method.penalty` and its like are given."""
        found: dict[str, SiteArrays] = {}
        common = {}
        for name, array in (settings | trainable).items():
            own = self.parameters.get(name)
            if own is not None and not own.site:
                common[own.name] = array
        for name, array in (settings | trainable).items():
            site, _, last = name.rpartition(".")
            if site in self.adapted:
                setattr(found.setdefault(site, SiteArrays(**common)), last, array)
        return found

    def statistics(self, model: nnx.Module) -> Arrays:
        """The running statistics as a forward pass of a model that `merge` made has left them."""
        names = [name for name, label in self.labels.items() if label == STATISTIC]
        held = dict(nnx.to_flat_state(nnx.state(model))) if names else {}
        return {name: held[self.paths[name]].get_value() for name in names}

    def _at_hand(self, name: str, array: jax.Array) -> jax.Array:
        axes = self.axes.get(name)
        return array if axes is None or axes[0] == "layers" or looked_up(axes) else gathered(array, axes)


def partition(model: nnx.Module) -> Partition:
    """Splits an adapted model (`inject`) into trainable, settings and frozen arrays, by label.

    Raises:
        ValueError: nothing is trainable, as in a model without adapters.
        InputError: the model is merged, so its adapters do not affect its output.
    """
    if any(isinstance(module, Merged) for _, module in nnx.iter_modules(model)):
        raise InputError("the model is merged, so training its adapters would have no effect. Use lora_jax.unmerge(model) first.")
    graphdef, state = nnx.split(model, graph=True)
    eval_graphdef = nnx.graphdef(nnx.view(model, raise_if_not_found=False, deterministic=True, use_running_average=True))
    parts: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    adapted, modules = adapted_paths(model), dict(nnx.iter_modules(model))
    paths, labels, axes, parameters, keys = {}, {}, {}, {}, []
    for path, variable in nnx.to_flat_state(state):
        name = own_name(variable) or parameter_name(path, adapted)
        if name in paths:
            raise ValueError(f"two parameters are called '{name}'")
        paths[name] = path
        if len(named := variable.get_metadata().get(AXES, ())) == variable.ndim > 0:
            axes[name] = tuple(named)
        label = variable.get_metadata().get(LABEL, FROZEN)
        if (parameter := variable.get_metadata().get(PARAMETER)) is not None:
            site: Any = modules[path[:-1]]
            own = variable.get_metadata()[PARAMETER_NAME]
            if parameter.scope == "adapter":
                parameters[name] = SiteArray("", own, parameter)
            else:
                weight = weight_shape(site.base, site.weight), weight_axes(site.base, site.weight)
                parameters[name] = SiteArray(logical_name(path[:-1]), own, parameter, *weight)
        if isinstance(variable, DropoutKey):
            keys.append(name)
        if isinstance(variable, AdapterSetting):
            parts[1][name] = variable.get_value()
        elif label != FROZEN:
            parts[0][name] = jnp.asarray(variable[...], jnp.float32)  # for a bfloat16 base too: small updates would be rounded away
            labels[name] = label
        else:
            parts[2][name] = variable.get_value()
    if not labels:
        raise ValueError("nothing is trainable: inject adapters first")
    sites = {logical_name(path): m for path, m in modules.items() if isinstance(m, AdaptedSite)}
    method = next((m.method for m in sites.values()), None)
    return Partition(graphdef, eval_graphdef, paths, labels, axes, parameters, tuple(keys), method, tuple(sites), *parts)


def with_dropout_keys(part: Partition, settings: Arrays, key: jax.Array) -> Arrays:
    """The settings with this step's dropout keys, one for each site and layer; they do not depend on the pack's layout.

    Args:
        part: the partition.
        settings: one member's settings.
        key: the member's key for this step.
    """
    out = dict(settings)
    for name in part.dropout_keys:
        keys, own = settings[name], jax.random.fold_in(key, zlib.crc32(name.encode()))
        if keys.ndim == 0:
            out[name] = own
        else:
            # Counted from the top layer down: a member's top layer is the same in every layout, its lowest is not.
            out[name] = jax.vmap(lambda i, own=own: jax.random.fold_in(own, i))(jnp.arange(keys.shape[0])[::-1])
    return out


def update_mask(part: Partition, member: ResolvedAdapter, layout: Layout) -> Arrays | None:
    """Masks for the gradients: 1 where a member trains a number, 0 elsewhere; float32. None if nothing needs a mask.

    `bias: lora_only` trains the biases of adapted layers alone, but a stacked bias holds those of all layers. A method's own arrays
    need masks unless their padding keeps its value by itself (`Method.self_padding`).
    """
    masks: dict[str, jax.Array] = {}
    if layout.bias == "lora_only":
        for of in layout.sites:
            name = f"{of.site.name}.bias"
            if of.site.biased:
                on = (_ranks(member, of) > 0).astype(np.float32)
                array = part.trainable[name]
                masks[name] = jnp.asarray(on).reshape(-1, *([1] * (array.ndim - 1))) if of.site.depth else jnp.float32(on[0])
    if not layout.method.self_padding:
        sites = {of.site.name: of for of in layout.sites}
        for name, own in part.parameters.items():
            if own.parameter.trained and own.site:
                of = sites[own.site]
                on = np.stack([_used(layout.method, of, own.name, int(rank)) for rank in _ranks(member, of)[of.first :]])
                masks[name] = jnp.asarray(on if part.trainable[name].ndim == on.ndim else on[0])
            elif own.parameter.trained:
                own_part = member_parameter(layout, member, own.name)
                on = np.zeros(part.trainable[name].shape, np.float32)
                on[own_part.own] = 1
                masks[name] = jnp.asarray(on)
    return masks or None


def member_parameter(layout: Layout, member: ResolvedAdapter, name: str) -> Parameter:
    """An array of scope `adapter`, in the shape that one member of a layout has."""
    each = [
        layout.method.parameters(of.site, int(rank))[name]
        for of in layout.sites
        if of.site.name in member.sites
        for rank in sorted({*member.sites[of.site.name].ranks} - {0})
    ]
    return largest(each)


def own_shapes(part: Partition, member: ResolvedAdapter, layout: Layout) -> dict[str, np.ndarray]:
    """The shapes of a member's own part of the trained arrays of its method.

    Returns:
        name -> (layers, axes) or (axes,) float32; 0 where the member does not adapt a layer.
    """
    sites, found = {of.site.name: of for of in layout.sites}, {}
    for name, own in part.parameters.items():
        if own.parameter.trained and own.site:
            of = sites[own.site]
            each = [layout.method.parameters(of.site, int(r))[own.name].shape if r else None for r in _ranks(member, of)[of.first :]]
            own_shape = np.array([(0,) * len(own.parameter.shape) if shape is None else shape for shape in each], np.float32)
            found[name] = own_shape if of.layers is not None else own_shape[0]
        elif own.parameter.trained:
            found[name] = np.array(member_parameter(layout, member, own.name).shape, np.float32)
    return found


def _ranks(member: ResolvedAdapter, of: SiteLayout) -> np.ndarray:
    """(depth,) or (1,): the member's rank at each layer of a site."""
    own = member.sites.get(of.site.name)
    return np.zeros(len(of.site.names), int) if own is None else own.ranks


def _used(method: Method, of: SiteLayout, name: str, rank: int) -> np.ndarray:
    """1 where a layer of this rank has numbers of its own, 0 where it is padding: float32, of size 1 along axes that no rank changes."""
    padded, changes = method.padded(of.site, of.extent)[name], _changing_axes(method, of.site, of.rank)[name]
    on = np.zeros([n if change else 1 for n, change in zip(padded.shape, changes, strict=True)], np.float32)
    if rank:
        on[method.parameters(of.site, rank)[name].own] = 1
    return on


@functools.lru_cache
def _changing_axes(method: Method, site: Site, rank: int) -> dict[str, tuple[bool, ...]]:
    """Name -> for each axis, whether its size is another at some rank up to this one."""
    each = [method.parameters(site, r) for r in range(1, rank + 1)]
    return {name: tuple(len(set(sizes)) > 1 for sizes in zip(*(one[name].shape for one in each), strict=True)) for name in each[0]}


def trainable_spec(part: Partition, name: str, mesh: AnyMesh) -> PartitionSpec:
    """The sharding of one member's trainable array; replicated if its axes have no names.

    Args:
        part: `name` is one of `part.trainable`.
    """
    array, axes = part.trainable[name], part.axes.get(name)
    if axes is None:
        return PartitionSpec(*[None] * array.ndim)
    if (own := part.parameters.get(name)) is None or not own.site:
        return parameter_sharding(mesh, array.shape, axes).spec
    assert own.axes is not None  # the array's are of them
    *_, inputs, outputs = parameter_sharding(mesh, own.shape, own.axes).spec
    along: dict[str | None, Any] = {"in": inputs, "out": outputs}
    lead = [None] * (array.ndim - len(own.parameter.axes))
    return PartitionSpec(*lead, *(along.get(axis) for axis in own.parameter.axes))


def member_shardings(part: Partition, mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a tree of stacked arrays, (members, ...).

    Args:
        tree: arrays or shapes. A leaf under a trainable array's name that has its shape is sharded like that array; other leaves are
            sharded along the members only.
    """
    specs = {name: trainable_spec(part, name, mesh) for name in part.trainable}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = next((k for k in reversed(keys) if k in specs), None)
        members = None if leaf.shape[0] % mesh.shape["sweep"] else "sweep"
        if name is None or leaf.shape[1:] != part.trainable[name].shape:
            return NamedSharding(mesh, PartitionSpec(members))
        return NamedSharding(mesh, PartitionSpec(members, *specs[name]))

    return jax.tree_util.tree_map_with_path(one, tree)


def even_members(part: Partition, mesh: Mesh | None, tree: Any, count: int) -> Any:
    """Inside a compiled program: stacked arrays with the last member repeated until there are `count`.

    Each device then computes an equal number of members. The program drops the results of the repeated ones.
    """
    missing = count - len(jax.tree.leaves(tree)[0])
    if not missing:
        return tree
    padded = jax.tree.map(lambda a: jnp.concatenate([a, *[a[-1:]] * missing]), tree)
    return padded if mesh is None else jax.lax.with_sharding_constraint(padded, member_shardings(part, mesh, padded))


def stack_members(part: Partition, mesh: Mesh | None, members: Sequence[Any]) -> Any:
    """One tree of stacked arrays on the mesh, from equal trees, one per member.

    Arrays drawn on the host are stacked there: one transfer, and nothing to compile for each new shape. Weights of the base are already
    on the mesh and are stacked there, because a process need not hold all of one.
    """
    if mesh is None:
        return jax.tree.map(lambda *arrays: _host_stack(arrays), *members)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(members), *np.shape(a)), a.dtype), members[0])

    def one(sharding: NamedSharding, *arrays: Any) -> jax.Array:
        if all(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in arrays):
            return jax.jit(lambda *a: jnp.stack(a), out_shardings=sharding)(*arrays)
        return place(_host_stack(arrays), sharding)

    return jax.tree.map(one, member_shardings(part, mesh, shapes), *members)


def _host_stack(arrays: Sequence[Any]) -> Any:
    if jnp.issubdtype(arrays[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(arrays)
    return jnp.asarray(np.stack([np.asarray(a) for a in arrays]))
