"""Trains one pack of a plan: builds it, resumes it, records it.

A pack is split if it does not fit into memory, or if only some of its members are retried. Splits are kept in the run's state, so that a
resumed run makes the same ones. A part starts from the last checkpoint of the pack it was split from, so no earlier work is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..config.schema import Config
from ..errors import InputError, OutOfMemory, Stopped, is_disk_full, is_out_of_memory
from ..parallel.processes import StopSignals, is_writer, process_count
from ..tracking import Progress, RunDirectory
from ..tracking.state import Split
from ..training.checkpoint import PackCheckpoints, Saved
from ..training.loop import Outcome, StepTrace, train_pack
from ..training.setup import Setup
from ..training.trunk import Trunk
from ..training.trunk_cache import FOLDER, keep_shared, keep_trunk
from .choice import PackModes, check_fits
from .execution import VMAP, PackPrograms, configured_mode
from .pack import Member, Pack, repack
from .planner import PackPlan
from .recorder import Recorder


@dataclasses.dataclass(frozen=True)
class PackRun:
    """A pack in training.

    Attributes:
        run: the run directory that it is recorded in.
        plan: its members.
        setup: what they share.
        signals: requests to stop.
        progress: the console.
        title: its name in the console.
        modes: the modes in which the run's packs run their members.
        layout_members: the pack's arrays have room for the ranks, targets and layers of these members too. The pack then has the same
            programs as any other pack with these layout members, and, with `scan`, bit-identical results.
    """

    run: RunDirectory
    plan: PackPlan
    setup: Setup
    signals: StopSignals
    progress: Progress
    title: str
    modes: PackModes
    layout_members: Sequence[Member] = ()

    def build(self) -> Pack:
        """The members at step 0."""
        setup, configs = self.setup, [m.config for m in self.plan.members]
        layout = setup.layout([*configs, *(m.config for m in self.layout_members)])
        mode, specs = configured_mode(configs[0]) or VMAP, [setup.spec(c) for c in configs]
        seen = setup.statistics(configs)
        options = {"specs": specs, "layout": layout, "statistics": seen, "objective": setup.objective(configs[0])}
        return Pack.build(setup.model, configs, setup.steps, setup.mesh, mode, **options)

    def checkpoints(self) -> PackCheckpoints:
        """This pack's checkpoints; the caller closes them."""
        names = [m.name for m in self.plan.members]
        keep = self.plan.members[0].config.tracking.keep_checkpoints

        def warn(text: str) -> None:
            self.progress.print(f"warning: {text}")

        options = {"keep": keep, "warn": warn, "order": self.setup.plan.order}
        return PackCheckpoints(self.run.checkpoints(names), names, self.setup.fingerprint, **options)

    def left(self) -> tuple[Pack, Saved | None]:
        """The pack at step 0, and its newest checkpoint if it has one."""
        pack = self.build()
        with contextlib.closing(self.checkpoints()) as checkpoints:
            return pack, checkpoints.restore(pack.state, pack.kept)

    def train(self, *, until: int | None = None, start: Callable[[Pack], Saved | None] | None = None) -> Trained:
        """Trains to the last step, or to step `until`, and records the members' curves.

        Args:
            until: as in `train_pack`.
            start: called with the newly built pack if it has no checkpoint; returns what to start from, or None for step 0 (the default).
        """
        members = self.plan.members
        config = members[0].config
        self.signals.check()
        pack = self.build()
        counts = [pack.parameter_count(i) for i in range(len(members))]
        known: PackPrograms | None = self.setup.programs.find(pack.program_key)
        what = f"{len(members)} member{'s' * (len(members) > 1)}, {sum(counts):,} trained parameters"
        self.progress.print(f"{self.title}: {what}; {'compiling' if known is None else 'uses the compiled programs of an earlier pack'}")
        trunk = self.setup.trunk(pack.part, config.training.data_seed)
        before = trunk.compiled if trunk is not None else 0
        if config.training.cache_trunk == "on":
            self._keep(trunk, config)
        keep_shared(self.setup, Path(config.tracking.dir), self.progress.print)
        if (said := self.modes.settle([m.name for m in members], pack, self.setup, trunk)) is not None:
            self.progress.print(f"{self.title}: {said}")
        if known is not None and known.mode == pack.programs.mode:
            pack.programs, before = known, before + known.compiled
        else:
            self.setup.programs.forget()
        check_fits(pack, self.setup, trunk)
        counted = _counts(trunk)
        recorder = Recorder(self.run, members, counts, self.setup, self.progress, self.title)
        try:
            with recorder, contextlib.closing(self.checkpoints()) as checkpoints:
                self.signals.check()
                self.signals.training = True
                outcome = train_pack(
                    pack,
                    self.setup,
                    eval_every=config.training.eval_every,
                    log_every=config.tracking.log_every,
                    listener=recorder,
                    checkpoints=checkpoints,
                    checkpoint_every=config.tracking.checkpoint_every,
                    stop=self.signals.asked,
                    trace=StepTrace(self.run.path / "profile", config.tracking.profile),
                    until=until,
                    start=None if start is None else lambda: start(pack),
                    trunk=trunk,
                )
        finally:
            self.signals.training = False  # after success or failure: a signal need not wait for a step any more
        if trunk is not None and trunk.stores is not None:
            hits, misses = (a - b for a, b in zip(_counts(trunk), counted, strict=True))
            self.progress.print(f"{self.title}: {hits:,} of {hits + misses:,} batches came from the trunk cache")
        self.setup.programs.get(pack.program_key, lambda: pack.programs)
        return Trained(pack, outcome, recorder, pack.programs.compiled + (trunk.compiled if trunk is not None else 0) - before)

    def _keep(self, trunk: Trunk | None, config: Config) -> None:
        if trunk is None:
            self.progress.print("trunk cache: off, because the pack has no trunk: the lowest layers are not the same for all members")
            return
        keep_trunk(trunk, self.setup, config.training, Path(config.tracking.dir) / FOLDER, self.progress.print)


def _counts(trunk: Trunk | None) -> tuple[int, int]:
    """Hits and misses of the trunk cache, in batches."""
    stores = trunk.stores if trunk is not None and trunk.stores is not None else ()
    return sum(s.hits for s in stores), sum(s.misses for s in stores)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained pack, its outcome and recorder, and how many programs were compiled for it."""

    pack: Pack
    outcome: Outcome
    recorder: Recorder
    programs: int


Start = Callable[[PackPlan, Pack], Saved | None]


class Splits:
    """The splits of a run.

    Args:
        run: the run.
        members: of the whole sweep.
    """

    def __init__(self, run: RunDirectory, members: Sequence[Member]):
        self._run = run
        self._members = {m.name: m for m in members}
        self._splits = run.state().splits

    def record(self, pack: Sequence[str], parts: Sequence[Sequence[str]], why: str) -> None:
        """Records that a pack, given by its members' names, continues in parts."""
        split = Split(list(pack), [list(p) for p in parts], why)
        self._splits.append(split)
        if is_writer():
            self._run.update_state(lambda state: state.splits.append(split))

    def is_split(self, names: Sequence[str]) -> bool:
        """Whether a pack was split."""
        return any(split.pack == list(names) for split in self._splits)

    def parts_of(self, plan: PackPlan) -> list[PackPlan]:
        """The packs that a pack continues as: itself, or its parts, which may be split further."""
        names = [m.name for m in plan.members]
        if not self.is_split(names):
            return [plan]
        parts = [part for split in self._splits if split.pack == names for part in split.parts]
        return [last for part in parts for last in self.parts_of(self._plan(part))]

    def unsplit(self) -> list[list[str]]:
        """The member names of each part that is not split further and whose members are all in the sweep."""
        parts = [part for split in self._splits for part in split.parts if not self.is_split(part)]
        return [part for part in parts if all(name in self._members for name in part)]

    def lineage(self, plan: PackPlan) -> list[PackPlan]:
        """The packs that this one was split from, its direct parent first."""
        found: list[PackPlan] = []
        names = [m.name for m in plan.members]
        while (parent := next((split.pack for split in self._splits if names in split.parts), None)) is not None:
            if not all(name in self._members for name in parent):
                break
            found.append(self._plan(parent))
            names = parent
        return found

    def _plan(self, names: Sequence[str]) -> PackPlan:
        return PackPlan(tuple(self._members[name] for name in names))


def is_of_the_pack(error: Exception) -> bool:
    """Whether a failure concerns one pack only, so that other packs can continue: not bad input, a full disk, or a request to stop.

    If several processes train together, the others are in the middle of the pack's step, so every failure ends the run.
    """
    return not (isinstance(error, (InputError, Stopped)) or is_disk_full(error) or process_count() > 1)


def train_split(
    plan: PackPlan,
    make: Callable[[PackPlan], PackRun],
    splits: Splits,
    *,
    until: int | None = None,
    start: Start | None = None,
    failed: Callable[[PackPlan, Exception], None] | None = None,
) -> Iterator[Trained]:
    """Trains a pack. If it does not fit into memory, it is split in halves, again and again; yields each part when it ends.

    Args:
        plan: the pack.
        make: returns a `PackRun` for a pack.
        splits: the run's splits; a new split is recorded there.
        until: the step to end at; the last by default.
        start: what the pack, or a part of it, starts from without a checkpoint; step 0 by default.
        failed: called with a pack or part that failed, and the error; without it the error is raised.

    Raises:
        OutOfMemory: a single member does not fit.
    """
    ready = splits.parts_of(plan)
    if ready != [plan]:
        for part in ready:
            yield from train_split(part, make, splits, until=until, start=start, failed=failed)
        return
    run = make(plan)
    try:
        trained, why = run.train(until=until, start=_start(plan, make, splits, start)), ""
    except Exception as error:
        run.signals.check(error)
        # All processes reach a configured limit together. If a device itself runs out, only one process knows, and the others wait.
        short = is_out_of_memory(error) and (process_count() == 1 or isinstance(error, OutOfMemory))
        if short and len(plan.members) == 1:
            advice = "To use less: a smaller training.batch_size or task.max_length, a larger training.accumulate, or model.remat: full."
            short_of = OutOfMemory(f"member '{plan.members[0].name}' does not fit into memory: {_first_line(error)}. {advice}")
            short_of.__cause__, error = error, short_of
        if not short or len(plan.members) == 1:
            if failed is None or not is_of_the_pack(error):
                raise error
            failed(plan, error)
            return
        trained, why = None, _first_line(error)
    if trained is not None:
        yield trained
        return
    names = [m.name for m in plan.members]
    gc.collect()  # frees what the failed attempt held
    half = -(-len(names) // 2)
    splits.record(names, [names[:half], names[half:]], why)
    run.progress.print(f"{run.title}: {why}; its {len(names)} members continue in two packs")
    yield from train_split(plan, make, splits, until=until, start=start, failed=failed)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _start(
    plan: PackPlan, make: Callable[[PackPlan], PackRun], splits: Splits, start: Start | None
) -> Callable[[Pack], Saved | None] | None:
    """What a part starts from: the last checkpoint of the packs it was split from, or else what those would have started from."""
    lineage = splits.lineage(plan)
    if not lineage and start is None:
        return None

    def begin(pack: Pack) -> Saved | None:
        for parent in lineage:
            run = make(parent)
            old, saved = run.left()
            if saved is not None:
                places = {m.name: i for i, m in enumerate(parent.members)}
                return repack(run.setup.model, [(old, places[m.name], saved) for m in plan.members], pack)
        return None if start is None else start(plan, pack)

    return begin
