"""What a sweep will take, before anything is trained or written: packs, memory, arithmetic, time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

from ..config.load import dump_config
from ..config.schema import Config
from ..packing.cost import PackMemory, PackShapes, matmul_rate
from ..packing.pack import form_of
from ..packing.planner import PackPlan, Part, Planner, Weights, plan_part
from ..parallel.program import memory_limit
from ..tracking import RunDirectory, holds_run
from ..training.setup import Preparer, Setup, SingleSlotCache, setup_key
from .halving import rung_steps
from .remaining import plan_remaining
from .space import members_of


@dataclasses.dataclass(frozen=True)
class PackOutlook:
    """What one pack will take.

    Attributes:
        plan: its members.
        steps: optimizer steps.
        padding: the share of the members' time that is padding, as the planner weighs it.
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

    def seconds(self, share: float = 1.0) -> float:
        """All of it, or where a share of its steps is trained."""
        return (self.compiling or 0.0) + share * self.training


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a sweep will take.

    Attributes:
        packs: those that would be trained now; of successive halving those up to the first rung.
        members: of the whole sweep (or part).
        ended: how many of them have ended already.
        limit: bytes a pack may take on a device; None where nobody says.
        share: of all members' steps that successive halving trains; 1 without.
        rate: FLOP/s a device reached at products of (rows, width) by (width, hidden) matrices.
        product: these three sizes.
        devices: of the mesh.
    """

    packs: list[PackOutlook]
    members: int
    ended: int
    limit: int | None
    share: float
    rate: float
    product: tuple[int, int, int]
    devices: int

    @property
    def flops(self) -> float:
        """Of all packs."""
        return self.share * sum(p.flops for p in self.packs)

    @property
    def seconds(self) -> float:
        """Expected, compiling included."""
        return sum(p.seconds(self.share) for p in self.packs)

    @property
    def programs(self) -> int:
        """How many training programs are compiled; as many evaluate."""
        return sum(p.compiling is not None for p in self.packs)


def look_ahead(config: Config, *, solo: bool = False, fresh: bool = False, many: bool = False, part: Part | None = None) -> Outlook:
    """Plans a sweep as `run_sweep` would, and compiles one program pair a pack to see what it takes; nothing is trained or written.

    Args:
        config, solo, fresh, many, part: as in `run_sweep`.

    Raises:
        InputError: as in `run_sweep`.
    """
    members = members_of(config, many=many)
    largest = 1 if solo or config.sweep is None else config.sweep.max_pack
    prepare = Preparer()
    planner = Planner(config, prepare, largest=largest)
    run = None if fresh else _left_behind(config)
    statuses = {} if run is None else run.statuses
    halving = config.sweep.halving if config.sweep is not None else None
    if part is not None:
        packs = plan_part(members, part, largest=largest, cut=planner.packs)
        members = [m for p in packs for m in p.members]
    elif run is not None and halving is None:
        packs = plan_remaining(members, run, planner)
    else:
        packs = planner.packs(members)
    packs = [p for p in packs if any(m.name not in statuses for m in p.members)]
    outlooks: list[PackOutlook] = []
    share, rate, product, devices = 1.0, math.nan, (0, 0, 0), 1
    known = SingleSlotCache()
    for pack in packs:
        setup = prepare(pack.members[0].config)
        if not outlooks:
            product = _product(setup, len(pack.members))
            rate, devices = matmul_rate(*product, pack.members[0].config.model.dtype), setup.mesh.size
            share = 1.0 if halving is None else halving_share(len(members), halving.factor, rung_steps(halving, setup.steps), setup.steps)
        outlooks.append(_pack(setup, pack, rate * devices, known))
    return Outlook(outlooks, len(members), sum(m.name in statuses for m in members), memory_limit(config), share, rate, product, devices)


def halving_share(members: int, factor: float, rungs: Sequence[int], steps: int) -> float:
    """The share of all members' steps that successive halving trains.

    >>> halving_share(32, 2, [1, 2, 4], 8)
    0.3125
    """
    bounds = [0, *rungs, steps]
    done, left = 0, members
    for before, until in itertools.pairwise(bounds):
        done += left * (until - before)
        left = math.ceil(left / factor)
    return done / (members * steps)


def _left_behind(config: Config) -> RunDirectory | None:
    """The run of this name, if there is one, to look at alone."""
    path = Path(config.tracking.dir) / config.name
    return RunDirectory.look(path, dump_config(config)) if holds_run(path) else None


def _product(setup: Setup, members: int) -> tuple[int, int, int]:
    batch, block = setup.plan.batch(0), setup.base.config.block
    return members * batch["tokens"][0].size, block.width, block.hidden


def _pack(setup: Setup, pack: PackPlan, rate: float, known: SingleSlotCache) -> PackOutlook:
    configs = [m.config for m in pack.members]
    shapes = PackShapes(setup, configs)
    count, steps, every = len(configs), setup.steps, configs[0].training.eval_every
    evaluations = -(-steps // every) if every else 1
    own, shared = shapes.evaluation_flops
    step = count * shapes.member_flops + shapes.shared_flops
    flops = steps * step + evaluations * (count * own + shared)
    weights = Weights.of(setup, configs)
    padding = 0.0 if weights is None else weights.padding(range(count))
    began = time.perf_counter()
    form = setup_key(configs[0]), form_of(configs, shapes.structure)
    again = known.find(form) is not None
    memory = known.get(form, lambda: shapes.memory(count))
    compiling = None if again else time.perf_counter() - began
    return PackOutlook(pack, steps, padding, step, flops, memory, compiling, flops / rate)
