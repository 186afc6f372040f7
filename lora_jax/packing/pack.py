"""A pack: members stacked on a leading axis, over one base. `repack` moves members between packs in the middle of their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..adapters.inject import draw_head, fill_member, inject_layout
from ..adapters.labels import STATISTIC
from ..adapters.layout import Layout, ResolvedAdapter, resolve, unite
from ..adapters.members import Window, own_windows
from ..adapters.methods.base import Method, method_of
from ..adapters.parameters import Statistics
from ..adapters.partition import Arrays, Partition, member_shardings, own_shapes, partition, stack_members, update_mask
from ..config.doors import METHODS
from ..config.schema import Config
from ..errors import RunError
from ..parallel.mesh import to_host
from ..parallel.program import memory_limit
from ..tasks.base import objective_of
from ..tasks.objectives import Objective
from ..tasks.on_policy import OnPolicy
from ..training.checkpoint import Saved
from ..training.optimizer import eval_params, hyper_of
from ..training.step import MemberFixed, MemberState, init_member
from .execution import VMAP, PackMode, PackPrograms

# Number of batches -> (site name, layer) -> what the layer saw of them.
Gathered = Mapping[int, Mapping[tuple[str, int], Statistics]]
# Packs of one key and one setup compile to equal programs.
ProgramKey = Hashable


@dataclasses.dataclass(frozen=True)
class Member:
    """One point of a sweep.

    Attributes:
        name: its swept values in short, such as `rank=8,targets=attention`; also the name of its folder.
        settings: swept dotted key -> value.
        config: the whole config with these values.
    """

    name: str
    settings: dict[str, Any]
    config: Config


@dataclasses.dataclass
class Pack:
    """Members that train inside one compiled step.

    Attributes:
        configs: one per member.
        specs: what each member adapts.
        structure: the layout, whose shapes hold every member.
        part: the adapted model, partitioned; `part.frozen` is the base.
        state, fixed: the members' stacked arrays, (members, ...).
        programs: the compiled training and evaluation steps.
    """

    configs: Sequence[Config]
    specs: list[ResolvedAdapter]
    structure: Layout
    part: Partition
    state: MemberState
    fixed: MemberFixed
    programs: PackPrograms

    @classmethod
    def build(
        cls,
        model: nnx.Module,
        configs: Sequence[Config],
        steps: int,
        mesh: Mesh | None = None,
        mode: PackMode = VMAP,
        *,
        specs: Sequence[ResolvedAdapter] | None = None,
        layout: Layout | None = None,
        statistics: Gathered | None = None,
        drawn: bool = True,
        objective: Objective | OnPolicy | None = None,
    ) -> Pack:
        """Puts the members on one base, each at its step 0.

        Args:
            model: the base with the task's head, without adapters.
            configs: one per member; their static parts are equal (`static_key`).
            steps: number of optimizer steps, for the schedules.
            mesh: the devices of the base and of the members' arrays.
            mode: how the compiled programs run the members.
            specs: the configs, resolved against the model; resolved here by default.
            layout: a layout that holds all members; the smallest one by default.
            statistics: what inits that read the data have seen of it (`Setup.statistics`).
            drawn: False leaves the adapters at their fill values, for those of a file.
            objective: the loss, or how members make batches and learn of them; that of the configs' task by default.
        """
        specs = [resolve(model, c.adapter) for c in configs] if specs is None else list(specs)
        structure = unite(model, specs) if layout is None else layout
        adapted = inject_layout(model, structure)
        part = partition(adapted)
        objective = objective_of(configs[0].task) if objective is None else objective
        if isinstance(objective, OnPolicy) and objective.needs_base:
            part = part.with_originals()
        members, memo = [], {}
        for config, spec in zip(configs, specs, strict=True):
            seen = None if statistics is None else statistics.get(spec.method.init_batches(spec.config))
            fill_member(adapted, spec, config.training.seed if drawn else None, seen, memo)
            draw_head(adapted, config.training.seed)
            filled = partition(adapted)
            hyper = hyper_of(config, steps, lambda spec=spec: own_shapes(part, spec, structure))
            members.append((filled.trainable, MemberFixed(hyper, filled.settings, update_mask(part, spec, structure))))
        trainable, fixed = (stack_members(part, mesh, column) for column in zip(*members, strict=True))
        init = jax.vmap(lambda t, f: init_member(part, t, f, objective))
        layouts = None if mesh is None else member_shardings(part, mesh, jax.eval_shape(init, trainable, fixed))
        state = jax.jit(init, out_shardings=layouts)(trainable, fixed)
        programs = PackPrograms(part, configs[0].training.data_seed, mesh, mode, memory_limit(configs[0]), objective)
        return cls(configs, specs, structure, part, state, fixed, programs)

    @property
    def kept(self) -> Arrays:
        """The members' own arrays that do not train, (members, ...): they are saved with those that do."""
        return self.part.kept(self.fixed.settings)

    def keep(self, kept: Arrays) -> None:
        """Puts other such arrays in the place of those that it was built with."""
        self.fixed = self.fixed._replace(settings={**self.fixed.settings, **kept})

    def eval_params(self, state: MemberState) -> Arrays:
        """What the members are evaluated and saved with, (members, ...): what they train, or what their optimizer makes of it."""
        if not self.fixed.hyper.optimizer.averages:
            return state.trainable
        run = jax.vmap(lambda own, hyper: eval_params(self.part, hyper, own.optimizer, own.trainable))
        return jax.jit(run, out_shardings={name: a.sharding for name, a in state.trainable.items()})(state, self.fixed.hyper)

    @property
    def program_key(self) -> ProgramKey:
        """Together with the setup and the mode, this determines the pack's programs."""
        return program_key(self.configs, self.structure)

    def use_mode(self, mode: PackMode) -> None:
        """Replaces the programs by uncompiled ones that run the members in another mode."""
        self.programs = self.programs.in_mode(mode)

    def release(self) -> None:
        """Releases the compiled programs, which take much memory; they are compiled again when needed."""
        self.use_mode(self.programs.mode)

    def windows(self, model: nnx.Module, index: int) -> dict[str, Window]:
        """The index of a member's own part in each array that it trains or keeps, without the member axis; None if it has no part in it.

        The rest is padding: ranks beyond the member's own, layers below its lowest.
        """
        return own_windows(model, self.part, self.structure, self.specs[index])

    def member_arrays(self, model: nnx.Module, index: int, arrays: Arrays) -> dict[str, Any]:
        """One member's part of arrays that it trains or keeps, (members, ...), in the shapes it has alone, on the host."""
        windows = self.windows(model, index)
        return {name: to_host(array[index])[window] for name, array in arrays.items() if (window := windows[name]) is not None}

    def with_member_arrays(self, model: nnx.Module, index: int, arrays: Arrays) -> Arrays:
        """What the members train and keep, (members, ...), with one member's part replaced by `arrays`, in the shapes it has alone."""
        windows = self.windows(model, index)
        found: Arrays = {}
        for name, array in (self.state.trainable | self.kept).items():
            rows = np.array(to_host(array))
            if (window := windows[name]) is not None:
                rows[index][window] = arrays[name]
            found[name] = jax.device_put(rows, array.sharding)
        return found

    def parameter_count(self, index: int) -> int:
        """How many parameters one member trains, without padding."""
        return trainable_count(self.part, self.specs[index], self.structure)


def trainable_count(part: Partition, spec: ResolvedAdapter, structure: Layout) -> int:
    """Trained parameters of a member: the method's at each adapted layer of a site, and all others that are trained."""
    sites = {s.site.name: s.site for s in structure.sites}
    total = sum(spec.method.count(sites[name], int(rank)) for name, own in spec.sites.items() for rank in own.ranks if rank)
    mask = update_mask(part, spec, structure) or {}
    for name, array in part.trainable.items():
        if name not in part.parameters and part.labels[name] != STATISTIC:
            layers = float(jnp.mean(mask[name])) if name in mask else 1.0
            total += round(array.size * layers)
    return total


def static_key(config: Config) -> tuple[object, ...]:
    """Members can share a pack if this is equal: everything but the adapter's and optimizer's numbers and the seed."""
    adapter, training = config.adapter, config.training
    method: Method = METHODS.get(adapter.method, "adapter.method")
    variant = method_of(adapter)
    return (
        adapter.method if variant == method else repr(variant),
        config.optimizer.kind,
        adapter.bias,
        tuple(adapter.modules_to_save),
        config.model.model_dump_json(),
        config.task.model_dump_json(),
        training.model_dump_json(exclude={"seed"}),
    )


def program_key(configs: Sequence[Config], structure: Layout) -> ProgramKey:
    """The program key of a pack of these members with this layout."""
    return static_key(configs[0]), structure, len(configs)


Source = tuple[Pack, int, Saved]


def repack(model: nnx.Module, sources: Sequence[Source], target: Pack) -> Saved:
    """The checkpoint that `target` would have if its members had trained in it from the start.

    A member's arrays are cut out of the padded shapes of its old pack and put into those of the new one; padding is zero in both.

    Args:
        model: the base of all packs.
        sources: for each member of `target`, the pack it was in, its index there, and that pack's checkpoint; all at the same step.
        target: the new pack, at step 0.

    Raises:
        RunError: the checkpoints are at different steps.
    """
    steps = {saved.step for _, _, saved in sources}
    if len(steps) != 1:
        raise RunError(f"members of steps {', '.join(map(str, sorted(steps)))} cannot continue in one pack")
    windows = [(pack.windows(model, index), target.windows(model, k)) for k, (pack, index, _) in enumerate(sources)]
    state = _moved(target.state, [saved.state for _, _, saved in sources], [i for _, i, _ in sources], windows)
    best = None
    if all(saved.best is not None for _, _, saved in sources):
        best = _moved(target.state.trainable, [saved.best for _, _, saved in sources], [i for _, i, _ in sources], windows)
    kept = _moved(target.kept, [saved.kept or pack.kept for pack, _, saved in sources], [i for _, i, _ in sources], windows)
    return Saved(steps.pop(), state, best, _loop([(index, saved.loop) for _, index, saved in sources]), kept)


def _moved(like: Any, trees: Sequence[Any], places: Sequence[int], windows: Sequence[tuple[dict[str, Window], dict[str, Window]]]) -> Any:
    """A tree like `like`, (members, ...), in which each member's part comes from its place in its own tree."""
    olds = [{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in trees]

    def leaf(path: Any, fresh: jax.Array) -> jax.Array:
        last = path[-1]
        name = last.key if isinstance(last, jax.tree_util.DictKey) else ""
        rows = np.array(to_host(fresh))  # padding, and a site that a member lacks, stay as they were built
        for row, (old, place, (before, after)) in enumerate(zip(olds, places, windows, strict=True)):
            found = old.get(jax.tree_util.keystr(path))
            if name not in after:
                if found is not None:
                    rows[row] = to_host(found[place])
            elif after[name] is not None:
                assert found is not None and before[name] is not None
                rows[row][after[name]] = to_host(found[place])[before[name]]
        return jax.device_put(rows, fresh.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _loop(members: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """The loop's own state for members from several packs."""

    def pick(*path: str) -> list[Any]:
        found = []
        for index, loop in members:
            value: Any = loop
            for part in path:
                value = value[part]
            found.append(value[index])
        return found

    first = members[0][1]
    rows = range(len(first["window"]))
    window = [{name: [loop["window"][row][name][i] for i, loop in members] for name in first["window"][row]} for row in rows]
    return {
        "best": {
            "score": pick("best", "score"),
            "step": pick("best", "step"),
            "metrics": {name: pick("best", "metrics", name) for name in first["best"]["metrics"]},
        },
        "window": window,
        "final": {name: pick("final", name) for name in first["final"]},
        "train": {name: pick("train", name) for name in first.get("train", {})},
        "tokens": first["tokens"],
        "seconds": max(loop["seconds"] for _, loop in members),
    }
