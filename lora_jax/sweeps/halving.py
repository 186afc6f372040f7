"""Successive halving (arXiv:1502.07943): all members train to the first rung, the best of them to the next, and so on to the end.

After a rung the survivors leave their packs and go on in fewer, smaller ones, each from the bits it had: as if it had never shared a
pack with the losers. What was decided is in the run's state, so that a run resumes where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..config.schema import HalvingConfig
from ..errors import InputError, RunError, hint
from ..packing.choice import PackModes
from ..packing.execution import SCAN, configured_mode
from ..packing.pack import Member, Pack, Source, repack
from ..packing.planner import PackPlan, Planner, keep_plan, packs_of_names, planned
from ..packing.recorder import record_failure
from ..packing.runner import PackRun, Splits, Trained, train_split
from ..parallel.processes import StopSignals, is_writer
from ..tasks.evaluators import EVALUATORS
from ..tracking import Progress, RunDirectory
from ..tracking.state import STATE, Rungs
from ..training.checkpoint import Saved
from ..training.setup import Preparer


def rung_steps(halving: HalvingConfig, total: int) -> list[int]:
    """The steps after which members are compared, rising and below `total`.

    Raises:
        InputError: a rung is not below the last step, or two fall on one.

    >>> rung_steps(HalvingConfig(rungs=3), 80)
    [10, 20, 40]
    """
    rungs = halving.rungs
    if isinstance(rungs, int):
        rungs = [max(1, round(total / halving.factor ** (rungs - i))) for i in range(rungs)]
    if rungs[-1] >= total or any(a >= b for a, b in itertools.pairwise(rungs)):
        raise InputError(f"sweep.halving.rungs: steps {rungs} must increase and stay below the {total} steps of the run.")
    return list(rungs)


def halving_fraction(members: int, factor: float, rungs: Sequence[int], steps: int) -> float:
    """The fraction of all members' steps that successive halving trains.

    >>> halving_fraction(32, 2, [1, 2, 4], 8)
    0.3125
    """
    bounds = [0, *rungs, steps]
    done, left = 0, members
    for before, until in itertools.pairwise(bounds):
        done += left * (until - before)
        left = math.ceil(left / factor)
    return done / (members * steps)


def survivors(scores: dict[str, float], factor: float) -> list[str]:
    """The members that go on: the best 1 / factor, rounded up, in the order of `scores`.

    Args:
        scores: member -> its score, larger is better; NaN for one that diverged, which loses to all others.
        factor: above 1.

    >>> survivors({"a": 0.5, "b": 0.9, "c": 0.7}, 2)
    ['b', 'c']
    """
    keep = math.ceil(len(scores) / factor)
    ranked = sorted(scores, key=lambda name: (math.isnan(scores[name]), -scores[name] if not math.isnan(scores[name]) else 0.0))
    return [name for name in scores if name in set(ranked[:keep])]


class Halving:
    """A sweep run by successive halving.

    Args:
        members: all of them; alike in model, task and length.
        halving: the config's section.
        prepare: makes set-ups.
        signals: ask it to stop.
        progress: the console.
        planner: cuts those that are left after each rung.

    Raises:
        InputError: members that cannot be compared, or rungs that do not rise to below the last step.
    """

    def __init__(
        self,
        members: Sequence[Member],
        halving: HalvingConfig,
        prepare: Preparer,
        signals: StopSignals,
        progress: Progress,
        planner: Planner,
    ):
        self._members, self._halving, self._planner = list(members), halving, planner
        self._signals, self._progress = signals, progress
        self._setup = prepare(members[0].config)
        if any(prepare(m.config) is not self._setup for m in members):
            raise InputError("sweep.halving: the members must share model, task and training, because they are compared at equal steps.")
        self._rungs = rung_steps(halving, self._setup.steps)
        self._evaluator = EVALUATORS.get(halving.metric or self._setup.metrics.selection, "sweep.halving.metric")
        if self._evaluator.name not in (computed := self._setup.metrics.held_out):
            name = self._evaluator.name
            raise InputError(f"sweep.halving.metric: task.kind {members[0].config.task.kind} has no '{name}'. {hint(name, computed)}")
        # Scanned, survivors keep the programs of the whole race, and with them every bit, whoever leaves.
        self._layout_members = self._members if configured_mode(members[0].config) == SCAN else []

    def train(self, run: RunDirectory) -> int:
        """Trains to the end, from wherever the run is; returns how many programs were compiled."""
        self._run, self._modes, self._splits = run, PackModes(run), Splits(run, self._members)
        done = self._decided()
        racing, before, programs = self._members, {}, 0
        for number, until in enumerate([*self._rungs, None]):
            packs = self._packs(racing, number)
            if number < len(done):
                kept = done[number]
            else:
                kept, compiled = self._stage(number, until, packs, before)
                programs += compiled
                if until is not None:
                    done.append(kept)
                    if is_writer():
                        rungs = Rungs([m.name for m in self._members], self._rungs, done)
                        self._run.update_state(lambda state, rungs=rungs: setattr(state, "halving", rungs))
            ended_in = [part for pack in packs for part in self._splits.parts_of(pack)]
            before = {member.name: (pack, place) for pack in ended_in for place, member in enumerate(pack.members)}
            racing = [m for m in racing if m.name in set(kept)]
        return programs

    def _packs(self, racing: list[Member], stage: int) -> list[PackPlan]:
        """The packs of a stage: those planned before, or new ones, which are kept."""
        by_name = {m.name: m for m in racing}
        before = planned(self._run.state(), stage)
        if sorted(name for pack in before for name in pack) == sorted(by_name):
            return packs_of_names(before, by_name)
        return keep_plan(self._run, self._planner.packs(racing), stage)

    def _decided(self) -> list[list[str]]:
        """Who went on after each rung so far."""
        rungs = self._run.state().halving
        if rungs is None:
            return []
        if rungs.members != [m.name for m in self._members] or rungs.steps != self._rungs:
            path = self._run.path / STATE
            raise InputError(
                f"{path}: ran successive halving with other members or rungs, which cannot change: give another 'name=', or --fresh."
            )
        return rungs.kept

    def _stage(
        self, number: int, until: int | None, packs: list[PackPlan], before: dict[str, tuple[PackPlan, int]]
    ) -> tuple[list[str], int]:
        """Trains the packs to a rung (or the end), and records whoever goes no further."""
        title = f"rung {number + 1}/{len(self._rungs)}" if until is not None else "last stretch"
        trained: list[Trained] = []
        for count, plan in enumerate(packs, 1):
            if all(self._run.statuses.get(m.name) == "failed" for m in plan.members):
                continue

            def make(part: PackPlan, name: str = f"{title}, pack {count}/{len(packs)}") -> PackRun:
                return self._pack_run(part, name)

            def start(part: PackPlan, pack: Pack) -> Saved:
                return self._start(pack, part, before)

            def failed(part: PackPlan, error: Exception) -> None:
                record_failure(self._run, part.members, error, self._progress)

            for one in train_split(plan, make, self._splits, until=until, start=start if before else None, failed=failed):
                one.pack.release()  # its arrays are wanted when the rung ends; its programs are the set-up's, for packs of the same form
                trained.append(one)
        scores: dict[str, float] = {}
        for one in trained:
            scores |= self._scores(one)
        kept = survivors(scores, self._halving.factor) if until is not None else list(scores)
        for one in trained:
            one.recorder.finish(one.pack, one.outcome, stopped=None if until is None else set(scores) - set(kept), rung=number + 1)
        if until is not None:
            self._progress.print(f"{title}: after {until} steps {len(kept)} of {len(scores)} members continue")
        return kept, sum(one.programs for one in trained)

    def _scores(self, trained: Trained) -> dict[str, float]:
        values, alive = trained.outcome.final[self._evaluator.name], trained.outcome.alive
        return {m.name: self._evaluator.sign * float(values[i]) if alive[i] else math.nan for i, m in enumerate(trained.recorder.members)}

    def _pack_run(self, plan: PackPlan, title: str) -> PackRun:
        return PackRun(self._run, plan, self._setup, self._signals, self._progress, title, self._modes, self._layout_members)

    def _start(self, pack: Pack, plan: PackPlan, before: dict[str, tuple[PackPlan, int]]) -> Saved:
        """The members as their packs of the rung before left them."""
        restored: dict[int, tuple[Pack, Saved]] = {}
        sources: list[Source] = []
        for member in plan.members:
            old, place = before[member.name]
            if id(old) not in restored:
                left, saved = self._pack_run(old, "").left()
                if saved is None:
                    folder = self._run.checkpoints([m.name for m in old.members])
                    raise RunError(f"{folder}: the checkpoint of a finished rung is missing or damaged. Start over with --fresh.")
                restored[id(old)] = left, saved
            sources.append((restored[id(old)][0], place, restored[id(old)][1]))
        return repack(self._setup.model, sources, pack)
