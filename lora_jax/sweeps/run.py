"""Running a plan: packs one after the other over one loaded base, every member recorded as it ends."""

from __future__ import annotations

import dataclasses
import errno
import functools
import time
from collections.abc import Sequence
from pathlib import Path

from ..config.load import dump_config
from ..config.schema import Config
from ..errors import InputError, RunError
from ..packing.choice import PackModes
from ..packing.execution import SCAN, told_mode
from ..packing.pack import Member
from ..packing.planner import PackPlan, Part, Planner, plan_packs, plan_part
from ..packing.runner import PackRun, Pieces, train_in_pieces
from ..parallel.processes import is_writer, writer_first, writer_says
from ..tracking import MemberResult, Progress, RunDirectory, holds_run
from ..training.setup import Preparer, Setup, check_adapters
from ..training.signals import StopSignals
from .failures import record_failure, reopen
from .halving import Halving
from .plan_record import keep_plan
from .remaining import plan_remaining, take_over_names
from .space import members_of


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """A finished run.

    Attributes:
        path: its directory.
        results: of the members that have ended, in the sweep's order.
        compiled_programs: how many this process compiled.
        unfinished: members that other processes have yet to end; 0 but for a part of a sweep.
    """

    path: Path
    results: list[MemberResult]
    compiled_programs: int
    unfinished: int = 0


def run_sweep(
    config: Config,
    *,
    solo: bool = False,
    fresh: bool = False,
    many: bool = False,
    part: Part | None = None,
    retry: Sequence[str] = (),
    progress: Progress | None = None,
) -> SweepOutcome:
    """Trains every member of a config that has not finished yet.

    Of several processes that run one program (`parallel/processes.py`), the first alone writes and speaks.

    Args:
        config: with or without a `sweep`; without one it is a single member.
        solo: train each member alone, to check the packed results against.
        fresh: set an old run of this name aside in place of resuming it; not with a part, whose run others share.
        many: whether a sweep of more than 10,000 members is meant.
        part: train this share of the members alone, while others train the rest into the same directory; the last to end writes the
            results of all.
        retry: names (or patterns, `*`) of members that failed or diverged, which are to be tried again.
        progress: the console; silent by default.

    Raises:
        InputError: the config, the data or the model will not do, or the run directory holds another config.
        RunError: a program was compiled more than once, or the disk is full.
        Stopped: the process was told to stop; the same call goes on from there.
    """
    with StopSignals() as signals:
        try:
            return _run(
                config,
                members_of(config, many=many),
                signals,
                solo=solo,
                fresh=fresh,
                part=part,
                retry=retry,
                progress=progress or Progress(enabled=False),
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f" at {error.filename}" if error.filename else ""
            raise RunError(
                f"no space left on the disk{where}. What was saved before is whole: make room, and the same command goes on from there."
            ) from error


def _run(
    config: Config,
    members: list[Member],
    signals: StopSignals,
    *,
    solo: bool,
    fresh: bool,
    part: Part | None,
    retry: Sequence[str],
    progress: Progress,
) -> SweepOutcome:
    began = time.perf_counter()
    largest = 1 if solo or config.sweep is None else config.sweep.max_pack
    prepare = Preparer()
    planner = Planner(config, prepare, largest=largest, say=progress.print)
    packs = [] if part is None else plan_part(members, part, largest=largest, cut=planner.packs)
    names = {m.name for m in members} if part is None else {m.name for p in packs for m in p.members}
    numbers = None if part is None else [i for i, m in enumerate(members) if m.name in names]
    halving = config.sweep.halving if config.sweep is not None else None
    if halving is not None and (part is not None or solo):
        raise InputError(f"sweep.halving: not with {'--solo' if solo else '--part'}; its members race each other.")

    if retry and (fresh or part is not None or halving is not None):
        raise InputError("--retry: not with --fresh, --part or sweep.halving.")

    def open_run() -> RunDirectory:
        where, name, text = config.tracking.dir, config.name, dump_config(config)
        return writer_first(lambda: RunDirectory.open(where, name, text, fresh=fresh, write=is_writer(), members=numbers))

    # An old run is resumed or refused before anything is loaded. A new directory is made only when every member is known to be
    # right: wrong input leaves nothing behind that would stand in the way of the mended config.
    run = open_run() if not fresh and writer_says(holds_run(Path(config.tracking.dir) / config.name)) else None
    if retry and run is None:
        raise InputError(f"--retry: {Path(config.tracking.dir) / config.name} holds no run yet.")
    try:
        if run is not None and part is None and halving is None:
            held = run
            if retry:
                writer_first(lambda: reopen(held, members, retry) if is_writer() else held.refresh())
            writer_first(lambda: take_over_names(held, config, members) if is_writer() else held.refresh())
            packs = plan_remaining(members, run, planner)
        ended = {n: s for n, s in run.statuses.items() if n in names} if run is not None else {}
        if part is None and (run is None or halving is not None):
            packs = planner.packs(members) if len(ended) < len(members) else []
        packs = [p for p in packs if any(m.name not in ended for m in p.members)]
        for pack_plan in reversed(packs if run is not None else []):  # those planned now are checked; the first last, as it is trained next
            configs = [m.config for m in pack_plan.members]
            check_adapters(prepare(configs[0]), configs)
        race = Halving(members, halving, prepare, signals, progress, planner) if halving is not None and packs else None
        run = run or open_run()
        if part is None and race is None and packs:
            packs = keep_plan(run, packs)
        if run.resumed:
            progress.print(f"{run.path}: resumed, {len(ended)} of {len(names)} members are done.")
        compiled = 0
        modes, pieces = PackModes(run), Pieces(run, members)
        told: Setup | None = None
        if race is not None:
            progress.print(describe_setup(config, prepare(members[0].config)))
            compiled = race.train(run)
        for number, pack_plan in enumerate(packs if race is None else [], 1):
            setup = prepare(pack_plan.members[0].config)
            if setup is not told:
                progress.print(describe_setup(pack_plan.members[0].config, setup))
                told = setup
            company = _company(pack_plan, members) if solo else ()
            make = functools.partial(_pack_run, run, setup, signals, progress, f"pack {number}/{len(packs)}", modes, company)
            failed = None if config.sweep is None else functools.partial(_record_failure, run, progress)
            for piece in [p for p in pieces.cut(pack_plan) if any(m.name not in ended for m in p.members)]:
                for trained in train_in_pieces(piece, make, pieces, failed=failed):
                    trained.recorder.finish(trained.pack, trained.outcome)
                    compiled += trained.programs
        done = {r.name: r for r in writer_first(run.results)} if names else {}
        results = [done[m.name] for m in members if m.name in done]
        if is_writer() and len(results) == len(members):
            run.write_results(results)
            if packs and part is None:  # a call that found all members done, or trained some of them, has no figures of the whole
                run.write_summary({"compiled_programs": compiled, "packs": len(packs), "seconds": time.perf_counter() - began})
        outcome = SweepOutcome(run.path, results, compiled, len(members) - len(results))
    finally:
        if run is not None:
            run.close()
    return outcome


def _pack_run(
    run: RunDirectory,
    setup: Setup,
    signals: StopSignals,
    progress: Progress,
    title: str,
    modes: PackModes,
    company: Sequence[Member],
    plan: PackPlan,
) -> PackRun:
    return PackRun(run, plan, setup, signals, progress, title, modes, company)


def _record_failure(run: RunDirectory, progress: Progress, plan: PackPlan, error: Exception) -> None:
    record_failure(run, plan.members, error, progress)


def _company(plan: PackPlan, members: Sequence[Member]) -> list[Member]:
    """Whom a member that is scanned alone keeps the programs of: all that it could share a pack with."""
    config = plan.members[0].config
    if told_mode(config) != SCAN:
        return []
    return next(list(p.members) for p in plan_packs(list(members), largest=len(members)) if plan.members[0] in p.members)


def describe_setup(config: Config, setup: Setup) -> str:
    """What was loaded, in a line or two: examples, batch shape, padding."""
    facts = setup.plan.summary
    return (
        f"{config.model.source}: {len(setup.data.train.tokens):,} training and {len(setup.data.held_out.tokens):,} held-out examples, "
        f"{setup.steps} steps of {config.training.batch_size}; batches of {facts['rows']} x {facts['length']} tokens, "
        f"{100 * facts['padding_share']:.1f} % padding (one example a row: {100 * facts['dynamic_padding_share']:.0f} %)"
    )
