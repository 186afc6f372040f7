"""Which packs a sweep trains now (`plan_sweep`), and what they will take (`estimate`)."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..config.load import dump_config, with_values
from ..config.schema import Config
from ..errors import InputError, hint
from ..packing.cost import PackMemory, PackShapes, matmul_rate
from ..packing.execution import compile_cache
from ..packing.pack import Member, program_key
from ..packing.planner import PackPlan, Part, Planner, Weights, packs_of_names, planned
from ..packing.runner import Splits
from ..parallel.program import memory_limit
from ..tracking import MemberResult, RunDirectory, holds_run
from ..tracking.state import Rungs
from ..training.setup import Preparer, Setup, SingleSlotCache, setup_key
from .halving import halving_fraction, rung_steps
from .space import full_name, members_of

RETRIED = ("failed", "diverged")


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What one call trains.

    Attributes:
        members: of the sweep, or of the part.
        packs: those with members that have not ended. Of successive halving, the packs up to the first rung.
        ended: member -> status, of those that ended before.
    """

    members: list[Member]
    packs: list[PackPlan]
    ended: dict[str, str]


def largest_pack(config: Config, *, solo: bool) -> int:
    """Most members in a pack."""
    return 1 if solo or config.sweep is None else config.sweep.max_pack


def plan_sweep(config: Config, members: list[Member], planner: Planner, run: RunDirectory | None, part: Part | None) -> SweepPlan:
    """Decides which packs are trained now.

    Args:
        config: of the sweep.
        members: all of them, in its order.
        planner: cuts members into packs.
        run: what there is of the run; None where it has not begun.
        part: train these members alone.

    Raises:
        InputError: an adapter does not fit its model, or the model or the data will not do.
    """
    statuses = {} if run is None else run.statuses
    halving = config.sweep is not None and config.sweep.halving is not None
    if part is not None:
        packs = planner.part(members, part)
        members = [m for p in packs for m in p.members]
    elif all(m.name in statuses for m in members):
        packs = []
    elif run is not None and not halving:
        packs = plan_remaining(members, run, planner)
    else:
        packs = planner.packs(members)
    ended = {m.name: statuses[m.name] for m in members if m.name in statuses}
    return SweepPlan(members, [p for p in packs if any(m.name not in ended for m in p.members)], ended)


def plan_remaining(members: list[Member], run: RunDirectory, planner: Planner) -> list[PackPlan]:
    """Packs of the members that have not ended.

    A pack that has a checkpoint goes on as it was, with members of it that ended meanwhile, or as the parts it was split into. One that
    was planned and has no checkpoint yet is as it was planned, without those that ended. All other members are planned anew.

    Args:
        members: of the whole sweep, in its order.
        run: what there is.
        planner: cuts the rest.
    """
    by_name = {m.name: m for m in members}
    waiting = {name for name in by_name if name not in run.statuses}
    packs: list[list[str]] = []
    splits = Splits(run, members)
    started = [*splits.unsplit(), *run.started_packs()]
    for names in [*started, *planned(run.state())]:
        known = set(names) <= by_name.keys() and len(names) <= planner.largest
        usable = known and bool(waiting & set(names)) and not splits.is_split(names)
        if usable and names not in started:
            names = [n for n in names if n in waiting]
        if usable and not any(set(names) & set(pack) for pack in packs):
            packs.append(names)
    taken = {name for names in packs for name in names}
    rest = planner.packs([m for m in members if m.name in waiting and m.name not in taken])
    return packs_of_names(packs, by_name) + rest


@dataclasses.dataclass(frozen=True)
class Joined:
    """The members of a sweep and those that its run directory has trained already.

    Attributes:
        members: of the sweep, in its order; then those that were trained there and are not in it. A member that is there already keeps its
            name, and so its folder and its packs.
        kept: how many the last ones are.
        left_out: names of members that began there, have not ended, and are not in this sweep.
        changed: results whose settings name more keys now.
    """

    members: list[Member]
    kept: int = 0
    left_out: Sequence[str] = ()
    changed: Sequence[MemberResult] = ()


def join_run(path: Path, config: Config, members: Sequence[Member]) -> Joined:
    """What a sweep comes to in a run directory that others, with other members, may have written. Nothing is written here.

    Args:
        path: a run of `config`, but for the sweep.
        config: of the whole sweep.
        members: its members.

    Raises:
        InputError: the run's state or a result is damaged, or its members raced one another and are not these.
    """
    run = RunDirectory(path)
    state, results = run.state(), {r.name: r for r in run.trained()}
    known = {name: r.settings for name, r in results.items()} | {n: s for n, s in state.members.items() if n not in results}
    configs: dict[str, Config] = {}
    for name, settings in known.items():
        with contextlib.suppress(InputError):  # it has keys or values that are not valid any more; its result stays in the tables
            configs[name] = with_values(config, settings)
    names: dict[str, str] = {}
    for name, one in configs.items():
        names.setdefault(one.model_dump_json(), name)
    own: list[Member] = []
    for member in members:
        name = names.get(member.config.model_dump_json())
        if name is None:
            name = full_name(member.settings) if member.name in known else member.name
        own.append(dataclasses.replace(member, name=name))
    taken = dict.fromkeys(m.name for m in own)
    others = [Member(name, known[name], configs[name]) for name in results if name in configs and name not in taken]
    _check_race(path, config, state.halving, own, others)
    # The settings of one side say nothing of keys that only the other side has.
    keys = {k: None for m in own for k in m.settings}
    earlier = {k: None for name in (*taken, *(m.name for m in others)) for k in known.get(name, ()) if k not in keys}
    own, others = [_with_keys(m, earlier) for m in own], [_with_keys(m, keys) for m in others]
    changed = []
    for member in (*own, *others):
        result = results.get(member.name)
        if result is not None and not member.settings.items() <= result.settings.items():
            changed.append(dataclasses.replace(result, settings={**result.settings, **member.settings}))
    left_out = [name for name in known if name not in results and name not in taken]
    return Joined([*own, *others], len(others), left_out, changed)


def _check_race(path: Path, config: Config, rungs: Rungs | None, own: Sequence[Member], others: Sequence[Member]) -> None:
    """Members of successive halving are compared with one another: who came later cannot have raced."""
    if config.sweep is None or config.sweep.halving is None:
        return
    raced = set(rungs.members) if rungs is not None else {m.name for m in own}
    unlike = sorted(raced.symmetric_difference(m.name for m in own) | {m.name for m in others})
    if unlike:
        shown = ", ".join(f"'{name}'" for name in unlike[:4]) + (f" and {len(unlike) - 4} more" if len(unlike) > 4 else "")
        raise InputError(
            f"{path}: ran successive halving, whose members cannot change; this sweep differs in {shown}. Give another 'name=', or --fresh."
        )


def _with_keys(member: Member, keys: Collection[str]) -> Member:
    """A member whose settings name these keys too, with the values of its config, where that has them."""
    found: dict[str, Any] = {}
    values = member.config.model_dump() if keys else {}
    for key in keys:
        value: Any = values
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) and part in value else _NONE
        if value is not _NONE:
            found[key] = value
    return dataclasses.replace(member, settings=member.settings | {k: v for k, v in found.items() if k not in member.settings})


_NONE = object()


def reopen(run: RunDirectory, members: Sequence[Member], wanted: Sequence[str]) -> None:
    """Makes members that failed or diverged ones that have yet to end; its result is kept beside, as `results-retried-1.json`.

    One that failed goes on from its pack's last checkpoint, one that diverged begins anew.

    Args:
        run: open for writing.
        members: of the whole sweep.
        wanted: names, or patterns such as `rank=8,*` or `*`.

    Raises:
        InputError: a name or pattern fits no member, or none that failed or diverged.
    """
    status: dict[str, str] = {}
    known = [m.name for m in members]
    for pattern in wanted:
        fitting = [n for n in known if n == pattern] or [n for n in known if fnmatch.fnmatchcase(n, pattern)]
        again = {n: run.statuses[n] for n in fitting if run.statuses.get(n) in RETRIED}
        if not fitting:
            raise InputError(f"--retry: no member '{pattern}'. {hint(pattern, known)}")
        if not again:
            one = f"'{pattern}' is {run.statuses.get(pattern, 'yet to be trained')}" if pattern in known else f"none of '{pattern}' is so"
            raise InputError(f"--retry: is for members that failed or diverged; {one}.")
        status |= again
    splits = Splits(run, members)
    for pack in run.started_packs():
        diverged = [n for n in pack if status.get(n) == "diverged"]
        failed = [n for n in pack if status.get(n) == "failed"]
        if diverged:  # the pack has ended, and its checkpoint holds what is not finite any more
            folder = run.checkpoints(pack)
            folder.rename(next(p for i in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.retried-{i}")).exists()))
        elif failed and failed != pack and not splits.is_split(pack):
            splits.record(pack, [failed], "tried again")
    for name in status:
        file = run.member(name) / "results.json"
        file.rename(next(p for i in range(1, 1000) if not (p := file.with_name(f"results-retried-{i}.json")).exists()))
    run.refresh()


@dataclasses.dataclass(frozen=True)
class PackEstimate:
    """What one pack will take.

    Attributes:
        plan: its members.
        steps: optimizer steps.
        padding: the fraction of the members' time that is padding, as the planner weighs it.
        step_flops: of one optimizer step, all members; of matrix products, as all figures here.
        flops: of all steps and evaluations.
        memory: on one device, as compiled.
        compiling: seconds that compiling its two programs took just now; None where they are those of a pack before it.
        training: seconds that its arithmetic takes at the measured rate.
    """

    plan: PackPlan
    steps: int
    padding: float
    step_flops: int
    flops: int
    memory: PackMemory
    compiling: float | None
    training: float

    def seconds(self, fraction: float = 1.0) -> float:
        """All of it, or where a fraction of its steps is trained."""
        return (self.compiling or 0.0) + fraction * self.training


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a sweep will take.

    Attributes:
        packs: those that would be trained now; of successive halving, those up to the first rung.
        members: of the whole sweep (or part).
        ended: how many of them have ended already.
        limit: bytes a pack may take on a device; None where there is no limit.
        fraction: of all members' steps that successive halving trains; 1 without.
        rate: FLOP/s a device reached at products of (rows, width) by (width, hidden) matrices.
        product: these three sizes.
        devices: of the mesh.
    """

    packs: list[PackEstimate]
    members: int
    ended: int
    limit: int | None
    fraction: float
    rate: float
    product: tuple[int, int, int]
    devices: int

    @property
    def flops(self) -> float:
        """Of all packs."""
        return self.fraction * sum(p.flops for p in self.packs)

    @property
    def seconds(self) -> float:
        """Expected, compiling included."""
        return sum(p.seconds(self.fraction) for p in self.packs)

    @property
    def programs(self) -> int:
        """How many training programs are compiled; as many evaluate."""
        return sum(p.compiling is not None for p in self.packs)


def estimate(config: Config, *, solo: bool = False, fresh: bool = False, many: bool = False, part: Part | None = None) -> Estimate:
    """Plans a sweep as `run_sweep` would, and compiles the programs of each pack to see what it takes; nothing is trained.

    Args:
        config, solo, fresh, many, part: as in `run_sweep`.

    Raises:
        InputError: as in `run_sweep`.
    """
    with compile_cache(config):
        return _estimate(config, solo=solo, fresh=fresh, many=many, part=part)


def _estimate(config: Config, *, solo: bool, fresh: bool, many: bool, part: Part | None) -> Estimate:
    prepare = Preparer()
    planner = Planner(config, prepare, largest=largest_pack(config, solo=solo))
    run, members = None if fresh else _run_before(config), members_of(config, many=many)
    members = members if run is None else join_run(run.path, config, members).members
    plan = plan_sweep(config, members, planner, run, part)
    halving = config.sweep.halving if config.sweep is not None else None
    packs: list[PackEstimate] = []
    fraction, rate, product, devices = 1.0, math.nan, (0, 0, 0), 1
    compiled = SingleSlotCache()
    for pack in plan.packs:
        setup = prepare(pack.members[0].config)
        if not packs:
            product = _product(setup, len(pack.members))
            rate, devices = matmul_rate(*product, pack.members[0].config.model.dtype), setup.mesh.size
            if halving is not None:
                fraction = halving_fraction(len(plan.members), halving.factor, rung_steps(halving, setup.steps), setup.steps)
        packs.append(_pack(setup, pack, rate * devices, compiled))
    return Estimate(packs, len(plan.members), len(plan.ended), memory_limit(config), fraction, rate, product, devices)


def _run_before(config: Config) -> RunDirectory | None:
    """The run of this name, if there is one; to read."""
    path = Path(config.tracking.dir) / config.name
    return RunDirectory.look(path, dump_config(config)) if holds_run(path) else None


def _product(setup: Setup, members: int) -> tuple[int, int, int]:
    return members * setup.plan.batch(0)["segment_ids"][0].size, *setup.layer_sizes


def largest_pack_shapes(config: Config) -> tuple[PackShapes, int, PackMemory]:
    """The pack of a sweep that takes the most memory: its programs, how many members it has, and what it takes. No weights are read.

    The one that `estimate` finds the largest too: of several packs the one with most members need not be it.

    Raises:
        InputError: the model, the data or an adapter will not do.
    """
    prepare = Preparer(weights=False)
    packs = Planner(config, prepare, largest=largest_pack(config, solo=False)).packs(members_of(config, many=True))
    largest: tuple[PackShapes, int, PackMemory] | None = None
    compiled = SingleSlotCache()
    for pack in packs:
        configs = [m.config for m in pack.members]
        shapes, count = PackShapes(prepare(configs[0]), configs), len(configs)
        key = setup_key(configs[0]), program_key(configs, shapes.structure)
        memory = compiled.get(key, lambda shapes=shapes, count=count: shapes.memory(count))
        if largest is None or memory.total > largest[2].total:
            largest = shapes, count, memory
    assert largest is not None  # a sweep without members is refused when it is read
    return largest


def _pack(setup: Setup, pack: PackPlan, rate: float, compiled: SingleSlotCache) -> PackEstimate:
    configs = [m.config for m in pack.members]
    shapes = PackShapes(setup, configs)
    count, steps, every = len(configs), setup.steps, configs[0].training.eval_every
    evaluations = -(-steps // every) if every else 1
    own, shared = shapes.evaluation_flops
    step = count * shapes.member_flops + shapes.shared_flops
    flops = steps * step + evaluations * (count * own + shared)
    if (test := setup.data.test) is not None:
        flops += (count * own + shared) * len(setup.plan.eval_groups(test)) // len(setup.plan.eval_groups())
    weights = Weights.of(setup, configs)
    padding = 0.0 if weights is None else weights.padding(range(count))
    began = time.perf_counter()
    key = setup_key(configs[0]), program_key(configs, shapes.structure)
    again = compiled.find(key) is not None
    memory = compiled.get(key, lambda: shapes.memory(count))
    compiling = None if again else time.perf_counter() - began
    return PackEstimate(pack, steps, padding, step, flops, memory, compiling, flops / rate)
