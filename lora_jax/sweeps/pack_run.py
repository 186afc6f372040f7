"""One pack of a plan: built, trained from wherever it was, recorded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config.schema import Config
from ..tracking import Progress, RunDirectory
from ..training.checkpoints import PackCheckpoints, Saved
from ..training.loop import Outcome, train_pack
from ..training.pack import Pack
from ..training.pack_choice import check_fits, told_mode
from ..training.pack_mode import VMAP
from ..training.prefix import Prefix
from ..training.prefix_cache import FOLDER, keep_prefix
from ..training.profile import StepTrace
from ..training.setup import Setup
from ..training.step import PackPrograms
from ..training.stopping import StopSignals
from .members import Member
from .pack_modes import PackModes
from .plan import PackPlan
from .record import Recorder


@dataclasses.dataclass(frozen=True)
class PackRun:
    """A pack in training.

    Attributes:
        run: where it is recorded.
        plan: its members.
        setup: what they share.
        signals: tell it to stop.
        progress: the console.
        title: what the console calls it.
        modes: how packs of the run are run.
        company: members whose ranks, targets and layers the pack's arrays have room for beside its own, so that its programs (and
            with them every bit, where members are scanned) are those of any other pack with this company.
    """

    run: RunDirectory
    plan: PackPlan
    setup: Setup
    signals: StopSignals
    progress: Progress
    title: str
    modes: PackModes
    company: Sequence[Member] = ()

    def build(self) -> Pack:
        """The members at step 0."""
        configs, company = [m.config for m in self.plan.members], [m.config for m in self.company]
        return Pack.build(self.setup.model, configs, self.setup.steps, self.setup.mesh, told_mode(configs[0]) or VMAP, company)

    def checkpoints(self) -> PackCheckpoints:
        """This pack's; to be closed."""
        names = [m.name for m in self.plan.members]
        keep = self.plan.members[0].config.tracking.keep_checkpoints

        def warn(text: str) -> None:
            self.progress.print(f"warning: {text}")

        return PackCheckpoints(self.run.checkpoints(names), names, self.setup.fingerprint, keep=keep, warn=warn)

    def left(self) -> tuple[Pack, Saved | None]:
        """The pack freshly built, and its newest checkpoint; None where there is none."""
        pack = self.build()
        with contextlib.closing(self.checkpoints()) as checkpoints:
            return pack, checkpoints.restore(pack.state)

    def train(self, *, until: int | None = None, start: Callable[[Pack], Saved | None] | None = None) -> Trained:
        """Trains to the last step, or to step `until`, and records the members' curves.

        Args:
            until: as in `train_pack`.
            start: where the pack, freshly built, begins where it has no checkpoint; step 0 by default, or where it gives None.
        """
        members = self.plan.members
        config = members[0].config
        pack = self.build()
        counts = [pack.parameter_count(i) for i in range(len(members))]
        known: PackPrograms | None = self.setup.programs.find(pack.form)
        what = f"{len(members)} member{'s' * (len(members) > 1)}, {sum(counts):,} trained parameters"
        self.progress.print(f"{self.title}: {what}; {'compiling' if known is None else 'run by the programs of an earlier pack'}")
        prefix = self.setup.prefix(pack.part, config.training.data_seed)
        before = prefix.compiled if prefix is not None else 0
        if config.training.cache_prefix == "on":
            self._keep(prefix, config)
        if (said := self.modes.settle([m.name for m in members], pack, self.setup, prefix)) is not None:
            self.progress.print(f"{self.title}: {said}")
        if known is not None and known.mode == pack.programs.mode:
            pack.programs, before = known, before + known.compiled
        else:
            self.setup.programs.forget()
        check_fits(pack, self.setup, prefix)
        counted = _counts(prefix)
        recorder = Recorder(self.run, members, counts, self.setup, self.progress, self.title)
        with recorder, contextlib.closing(self.checkpoints()) as checkpoints:
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
                prefix=prefix,
            )
            self.signals.training = False
        if prefix is not None and prefix.stores is not None:
            hits, misses = (a - b for a, b in zip(_counts(prefix), counted, strict=True))
            self.progress.print(f"{self.title}: {hits:,} of {hits + misses:,} batches began from the prefix cache")
        self.setup.programs.get(pack.form, lambda: pack.programs)
        return Trained(pack, outcome, recorder, pack.programs.compiled + (prefix.compiled if prefix is not None else 0) - before)

    def _keep(self, prefix: Prefix | None, config: Config) -> None:
        if prefix is None:
            self.progress.print("prefix cache: off, for the members have no layer in common below the lowest that one of them trains")
            return
        keep_prefix(prefix, self.setup, config.training, Path(config.tracking.dir) / FOLDER, self.progress.print)


def _counts(prefix: Prefix | None) -> tuple[int, int]:
    """Batches that were found in the prefix cache, and that were not."""
    stores = prefix.stores if prefix is not None and prefix.stores is not None else ()
    return sum(s.hits for s in stores), sum(s.misses for s in stores)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A pack that was trained, with what it came to, who records it, and how many programs were compiled for it."""

    pack: Pack
    outcome: Outcome
    recorder: Recorder
    programs: int
