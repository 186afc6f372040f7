"""Runs a sweep: plans it, trains its packs one after the other over one loaded base, and records each member when it ends."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.load import config_of, dump_config, load_config, with_values
from ..config.schema import Config
from ..errors import InputError, RunError, is_disk_full
from ..packing.choice import PackModes
from ..packing.execution import SCAN, compile_cache, configured_mode
from ..packing.pack import Member
from ..packing.planner import PackPlan, Part, Planner, alike, keep_plan
from ..packing.recorder import record_failure
from ..packing.runner import PackRun, Splits, train_split
from ..parallel.processes import StopSignals, is_writer, writer_first, writer_says
from ..tracking import MemberResult, Progress, RunDirectory, holds_run
from ..tracking.state import STATE
from ..training.setup import Preparer, Setup, check_adapters
from .halving import Halving
from .plan import Joined, SweepPlan, join_run, largest_pack, plan_sweep, reopen
from .restore import confirm_inputs
from .space import members_of


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """A finished run.

    Attributes:
        path: its directory.
        results: of the members that have ended, in the sweep's order.
        compiled_programs: how many this process compiled.
        unfinished: how many members other processes still train; above 0 only for a part of a sweep.
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

    If several processes run one program (`parallel/processes.py`), only the first writes and prints.

    Args:
        config: with or without a `sweep`; without one it is a single member.
        solo: train each member alone, to check the packed results.
        fresh: rename an old run of this name instead of resuming it; not with a part, because other processes share the run.
        many: allow more than 10,000 members.
        part: train only these members, while other processes train the rest into the same directory; the last one to end
            writes the results of all.
        retry: names (or patterns, `*`) of members that failed or diverged, to train again.
        progress: the console; silent by default.

    Raises:
        InputError: the config, the data or the model is not valid, or the run directory holds another config.
        RunError: a program was compiled more than once, or the disk is full.
        Stopped: the process was asked to stop; the same call resumes from there.
    """
    with StopSignals() as signals, compile_cache(config):
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
        except Exception as error:
            if (told := _told_of_disk(error, Path(config.tracking.dir))) is None:
                raise
            raise RunError(told) from error


def _told_of_disk(error: Exception, root: Path) -> str | None:
    """The message for a failure of the disk that the run is written to; None for any other failure."""
    intact = "What was saved before is intact"
    named = error.filename if isinstance(error, OSError) and isinstance(error.filename, (str, os.PathLike)) else None
    if is_disk_full(error):
        where = f" at {named}" if named else ""
        return f"no space left on the disk{where}. {intact}: make room, and the same command resumes from there."
    if isinstance(error, OSError) and named and Path(named).resolve().is_relative_to(root.resolve()):
        advice = "Make it writable, or give another 'tracking.dir='; the same command resumes from there."
        return f"{named}: cannot be written ({error.strerror or error}). {intact}. {advice}"
    return None


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
    halving = config.sweep.halving if config.sweep is not None else None
    if halving is not None and (part is not None or solo):
        raise InputError(f"sweep.halving: not with {'--solo' if solo else '--part'}; halving compares all members with one another.")
    if retry and (fresh or part is not None or halving is not None):
        raise InputError("--retry: not with --fresh, --part or sweep.halving.")
    path = Path(config.tracking.dir) / config.name
    there = not fresh and writer_says(holds_run(path))
    joined = join_run(path, config, members) if there else Joined(members)
    members = joined.members
    prepare = Preparer()
    planner = Planner(config, prepare, largest=largest_pack(config, solo=solo), say=progress.print)
    own = {m.name for m in (members if part is None else plan_sweep(config, members, planner, None, part).members)}
    numbers = None if part is None else [i for i, m in enumerate(members) if m.name in own]

    def open_run() -> RunDirectory:
        where, name, text = config.tracking.dir, config.name, dump_config(config)
        return writer_first(lambda: RunDirectory.open(where, name, text, fresh=fresh, write=is_writer(), members=numbers))

    if there:
        _check_inputs(path, config, members, prepare)
    # An old run is resumed or refused before anything is loaded. A new directory is made only when every member is known to be
    # right: wrong input leaves nothing behind that would stand in the way of the corrected config.
    run = open_run() if there else None
    if retry and run is None:
        raise InputError(f"--retry: there is no run in {path} yet.")
    try:
        if run is not None:
            held = run
            writer_first(lambda: _take_over(held, joined, retry) if is_writer() else held.refresh())
        plan = plan_sweep(config, members, planner, run, part)
        for pack in reversed(plan.packs if run is not None else []):  # those planned now are checked; the first last, as it is trained next
            configs = [m.config for m in pack.members]
            check_adapters(prepare(configs[0]), configs)
        race = Halving(members, halving, prepare, signals, progress, planner) if halving is not None and plan.packs else None
        if run is None:
            run = open_run()
            _register(run, members)
        for section in run.state().dropped:
            progress.print(f"warning: {run.path / STATE}: '{section}' is damaged and is rebuilt.")
        if part is None and race is None and plan.packs:
            plan = dataclasses.replace(plan, packs=keep_plan(run, plan.packs))
        if run.resumed:
            progress.print(f"{run.path}: resumed, {len(plan.ended)} of {len(plan.members)} members are done.")
            if joined.kept:
                progress.print(f"{run.path}: {joined.kept} of them are from an earlier sweep under this name; they stay in the results.")
            if joined.left_out:
                names = ", ".join(joined.left_out[:4]) + (" ..." if len(joined.left_out) > 4 else "")
                progress.print(f"warning: {run.path}: {len(joined.left_out)} started earlier and not in this sweep: {names}")
        if race is not None:
            _describe(run, config, prepare(members[0].config), progress)
            _keep_identity(run, prepare(members[0].config), members[0].config, members, progress)
            compiled = race.train(run)
        else:
            compiled = _train_packs(plan, run, members, prepare, signals, progress, solo=solo)
        done = {r.name: r for r in writer_first(run.results)} if own else {}
        results = [done[m.name] for m in members if m.name in done]
        complete = len(results) == len(members)
        results += [done[name] for name in done if name not in {m.name for m in members}]  # of an older version: with keys it has no more
        if is_writer() and complete:
            # Before `results.csv`, with which the run is whole: killed in between, the next call writes that one.
            if not plan.packs and "packs" not in run.state().summary and part is None:
                summary = {"packs": len({r.seconds for r in results}), "seconds": sum({r.seconds for r in results})}
                run.update_state(lambda state: state.summary.update(summary))
            if plan.packs and part is None:  # a call that found all members done, or trained some of them, has no figures of the whole
                summary = {"compiled_programs": compiled, "packs": len(plan.packs), "seconds": time.perf_counter() - began}
                run.update_state(lambda state: state.summary.update(summary))
            run.write_results(results)
        outcome = SweepOutcome(run.path, results, compiled, len(members) - sum(m.name in done for m in members))
    except Exception as error:
        if run is not None and not (run.path / "config.yaml").exists():
            advice = "Remove what is left of it, or give another 'name='."
            raise RunError(f"{run.path}: the run directory was removed while the run wrote to it ({error}). {advice}") from error
        raise
    finally:
        if run is not None:
            run.close()
    return outcome


def _take_over(run: RunDirectory, joined: Joined, retry: Sequence[str]) -> None:
    """Updates the settings of an old run's members for this call, and reopens those to retry."""
    for result in joined.changed:
        if result.name in run.statuses:
            result.write(run.member(result.name))
    if retry:
        reopen(run, joined.members, retry)
    run.refresh()
    _register(run, joined.members)


def _check_inputs(path: Path, config: Config, members: Sequence[Member], prepare: Preparer) -> None:
    """Refuses to continue a run whose base, tokenizer or data has changed, before anything is written to it."""
    look = RunDirectory.look(path, dump_config(config))
    known = look.state().identity
    pending = next((m for m in members if m.name not in look.statuses), None)
    if pending is not None and known:
        confirm_inputs(path, prepare(pending.config), pending.config, members)


def _keep_identity(run: RunDirectory, setup: Setup, config: Config, members: Sequence[Member], progress: Progress) -> None:
    """Records what the members of a setup are trained on; members trained earlier must have been trained on the same."""
    alike, told = confirm_inputs(run.path, setup, config, members)
    if told is not None:
        progress.print(f"warning: {told}")
    known = run.state().identity
    begun = {*run.statuses, *(name for pack in run.started_packs() for name in pack)}
    if unknown := [name for name in alike if name in begun and name not in known]:
        progress.print(
            f"warning: {run.path}: {len(unknown)} of its members are from an older version, which did not record base, tokenizer and "
            "data; they are assumed to be the current ones."
        )
    identity = setup.identity
    new = {name: identity for name in alike if name not in known or name not in run.statuses}
    if is_writer() and any(known.get(name) != identity for name in new):
        run.update_state(lambda state: state.identity.update(new))


def _register(run: RunDirectory, members: Sequence[Member]) -> None:
    """Records all members of the run, because `config.yaml` has only the newest sweep."""
    own = {m.name: m.settings for m in members}
    if is_writer() and run.state().members != own:
        run.update_state(lambda state: setattr(state, "members", own))


def _train_packs(
    plan: SweepPlan, run: RunDirectory, members: list[Member], prepare: Preparer, signals: StopSignals, progress: Progress, *, solo: bool
) -> int:
    """Trains the packs of a plan, one after the other; returns how many programs were compiled."""
    modes, splits = PackModes(run), Splits(run, members)
    described: Setup | None = None
    compiled = 0

    def failed(pack: PackPlan, error: Exception) -> None:
        record_failure(run, pack.members, error, progress)

    for number, pack in enumerate(plan.packs, 1):
        config = pack.members[0].config
        setup = prepare(config)
        if setup is not described:
            _describe(run, config, setup, progress)
            _keep_identity(run, setup, config, members, progress)
            described = setup
        make = functools.partial(
            PackRun,
            run,
            setup=setup,
            signals=signals,
            progress=progress,
            title=f"pack {number}/{len(plan.packs)}",
            modes=modes,
            layout_members=_layout_members(pack, members) if solo else (),
        )
        for one in splits.parts_of(pack):
            if all(m.name in plan.ended for m in one.members):
                continue
            for trained in train_split(one, make, splits, failed=None if config.sweep is None else failed):
                trained.recorder.finish(trained.pack, trained.outcome)
                compiled += trained.programs
    return compiled


def _layout_members(plan: PackPlan, members: Sequence[Member]) -> list[Member]:
    """With `--solo` and `scan`: all members that could share a pack with this one, so that it runs the same program as in that pack."""
    if configured_mode(plan.members[0].config) != SCAN:
        return []
    return next(group for group in alike(members) if plan.members[0] in group)


def _describe(run: RunDirectory, config: Config, setup: Setup, progress: Progress) -> None:
    """Prints what was loaded, and keeps how the data's rows were used in the run's summary, for the report."""
    lines = [*getattr(setup.base, "transform_notes", ()), *setup.data.lines()]
    for line in (describe_setup(config, setup), *lines):
        progress.print(line)
    if is_writer():
        run.update_state(lambda state: state.summary.update(data=list(dict.fromkeys([*state.summary.get("data", []), *lines]))))


def describe_setup(config: Config, setup: Setup) -> str:
    """What was loaded, in a line or two: examples, batch shape, padding."""
    facts, data = setup.plan.summary, setup.data
    if (collected := data.collected) is not None:
        return f"{config.model.source}: {setup.steps} training steps; {collected.said}"
    test = "" if data.test is None else f" and {len(data.test):,} test"
    return (
        f"{config.model.source}: {len(data.train):,} training{',' if test else ' and'} {len(data.held_out):,} held-out{test} "
        "examples, "
        f"{setup.steps} steps of {config.training.batch_size}; batches of {facts['rows']} x {facts['length']} tokens, "
        f"{100 * facts['padding_share']:.1f} % padding (one example per row: {100 * facts['dynamic_padding_share']:.0f} %)"
    )


def failures_message(results: Sequence[MemberResult]) -> str | None:
    """A message that lists the members that failed, or says that all diverged; None otherwise."""
    failed = [r for r in results if r.status == "failed"]
    if not failed and results and all(r.status == "diverged" for r in results):
        who = f"member '{results[0].name}'" if len(results) == 1 else f"all {len(results)} members"
        return f"{who} diverged: a loss was not finite. Try a smaller optimizer.learning_rate, or --retry '*' with the same config."
    if not failed:
        return None
    lines = [f"  {r.name}: {r.error}" for r in failed[:6]] + ([f"  ... and {len(failed) - 6} more"] if len(failed) > 6 else [])
    count = f"{len(failed)} member{'s' * (len(failed) > 1)} failed (error.txt in each folder has the traceback):"
    return "\n".join([count, *lines, f"The same command with --retry NAME tries one again: --retry '{failed[0].name}', or --retry '*'."])


def fit(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    values: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    **more: Any,
) -> MemberResult:
    """Trains one adapter and returns its result. Everything else is in the run directory.

    Args:
        config: a `Config`, one as nested mappings, or the path of a YAML file; its sweep is ignored.
        values: dotted config key -> value: `{"adapter.rank": 4}`.
        fresh: rename an old run directory of this name instead of resuming it.
        more: the same with `__` for the dot: `adapter__rank=4`.
    """
    loaded = _loaded(config, {**(values or {}), **{key.replace("__", "."): value for key, value in more.items()}}, None, "fit")
    return run_sweep(loaded, fresh=fresh, progress=Progress()).results[0]


def sweep(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    grid: Mapping[str, Sequence[Any]] | None = None,
    values: Mapping[str, Any] | None = None,
    *,
    solo: bool = False,
    fresh: bool = False,
    retry: Sequence[str] = (),
) -> SweepOutcome:
    """Trains all members of a sweep, in packs.

    Args:
        config: as in `fit`, with its sweep.
        grid: dotted config key -> values; replaces the config's `sweep.grid`. The rest of its sweep (seeds, halving, limits) stays.
        values: as in `fit`; `{"name": "other"}` gives a run directory of its own.
        solo: train each member alone.
        fresh: rename an old run directory of this name instead of resuming it.
        retry: names (or patterns, `*`) of members that failed or diverged, to train again.

    Raises:
        InputError: a value is not valid, or is of a key that is swept; no failed member has a name in `retry`.
    """
    return run_sweep(_loaded(config, values or {}, grid, "sweep"), solo=solo, fresh=fresh, retry=retry, progress=Progress())


def _loaded(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    values: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]] | None,
    where: str,
) -> Config:
    """The config as given from Python: for `fit` without its sweep, for `sweep` with another grid."""
    if isinstance(config, Config):
        loaded = config
    elif isinstance(config, Mapping):
        loaded = config_of(config, where)
    elif isinstance(config, (str, os.PathLike)):
        loaded = load_config(config)
    else:
        raise InputError(f"{where}: the config is a {type(config).__name__}; give the path of a YAML file, a Config, or nested mappings.")
    changes: dict[str, Any] = {}
    if where == "fit":
        changes = {"sweep": None}
    elif grid is not None:
        wrong = next((key for key, own in grid.items() if isinstance(own, str) or not isinstance(own, Sequence)), None)
        if wrong is not None:
            advice = (
                f'sweep(config, {{"{wrong}": [...]}}) sweeps over it, sweep(config, values={{"{wrong}": ...}}) sets it for all members.'
            )
            raise InputError(f"sweep: '{wrong}' has the value {grid[wrong]!r}, not a list of values. {advice}")
        kept = {} if loaded.sweep is None else loaded.sweep.model_dump(exclude={"grid"})
        changes = {"sweep": {**kept, "grid": {key: list(own) for key, own in grid.items()}}}
    if changes or values:
        loaded = with_values(loaded, values, where=where, sections=changes)
    return loaded
