"""`lora-jax train` and `lora-jax sweep`: train one adapter, or all members of a sweep."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, RunError
from ..parallel.processes import Joining, is_writer, join
from .options import (
    ConfigPath,
    Coordinator,
    ExtendSteps,
    Fresh,
    Overrides,
    ProcessCount,
    ProcessId,
    StartTimeout,
    Yes,
    results_console,
    with_extension,
)

if TYPE_CHECKING:
    from ..config.schema import Config
    from ..packing.planner import Part
    from ..sweeps.run import SweepOutcome
    from ..tracking import Progress


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    extend_steps: ExtendSteps = None,
    coordinator: Coordinator = None,
    process_id: ProcessId = None,
    process_count: ProcessCount = None,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Train one adapter.

    The run directory runs/NAME/ holds the resolved config, TensorBoard events, results and checkpoints. The same command resumes an
    interrupted run. A run directory of a different config is refused. On SIGTERM or Ctrl-C the run saves a checkpoint, then exits with
    code 75 or 130.
    """
    from ..config.load import load_config

    loaded = load_config(config, with_extension(overrides, extend_steps))
    if loaded.sweep is not None:
        raise InputError(f"{config}: has a 'sweep'. Run: lora-jax sweep {config}, or train one adapter with the override sweep=null.")
    joining = Joining(coordinator, process_id, process_count, start_timeout)
    run_and_report(loaded, solo=True, fresh=fresh, joining=joining)


def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    solo: Annotated[bool, typer.Option("--solo", help="Train each member alone, for comparison: same results, more time.")] = False,
    fresh: Fresh = False,
    extend_steps: ExtendSteps = None,
    yes: Yes = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Train part I of N of the members. Other processes train the other parts into the same run directory.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show packs, members, memory, FLOPs and estimated time. Trains nothing and writes no run.")
    ] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            "--retry",
            metavar="NAME",
            help="Train a failed or diverged member again, by name or pattern such as 'rank=8,*'. Repeatable.",
            show_default=False,
        ),
    ] = None,
    coordinator: Coordinator = None,
    process_id: ProcessId = None,
    process_count: ProcessCount = None,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Train all members of a sweep over one frozen base.

    The config's `sweep` section (grid, zip, random, members, seeds) defines the members. They are packed into as few compiled
    programs as possible. The run directory runs/NAME/ holds one folder per member, results.csv and a report.
    """
    from ..config.load import load_config
    from ..sweeps.space import MANY, points

    loaded = load_config(config, with_extension(overrides, extend_steps))
    if loaded.sweep is None:
        raise InputError(f"{config}: has no 'sweep'. Add one (sweep.grid, for example), or run: lora-jax train {config}")
    if part is not None and fresh:
        raise InputError(
            "--fresh: not with --part, because other parts use the run directory. Use another 'name=', or lora-jax launch --fresh."
        )
    if not yes and sys.stdin.isatty() and sum(1 for _ in itertools.islice(points(loaded), MANY + 1)) > MANY:
        yes = typer.confirm(f"{config} defines more than {MANY:,} members. Train them all?")
    if plan:
        from ..packing.planner import Part
        from .plan import plan_command

        plan_command(loaded, solo=solo, fresh=fresh, many=yes, part=Part.parse(part) if part is not None else None)
        return
    joining = Joining(coordinator, process_id, process_count, start_timeout)
    run_and_report(loaded, solo=solo, fresh=fresh, many=yes, part=part, retry=retry or [], joining=joining)


def run_and_report(
    config: Config, *, solo: bool, fresh: bool, many: bool = False, part: str | None = None, retry: Sequence[str] = (), joining: Joining
) -> None:
    """Trains a config's members, then writes the report and prints the results; of several processes only the first writes.

    Raises:
        RunError: members failed. All other members are trained and reported.
    """
    from ..packing.planner import Part
    from ..sweeps.run import failures_message, run_sweep
    from ..tracking import Progress

    share = Part.parse(part) if part is not None else None
    join(joining)
    progress = Progress(enabled=is_writer())
    outcome = run_sweep(config, solo=solo, fresh=fresh, many=many, part=share, retry=retry, progress=progress)
    if not is_writer():
        return
    failures = failures_message(outcome.results)
    try:
        if failures is None or any(result.final for result in outcome.results):
            _report(config, outcome, share, progress)
    finally:  # members that failed are what the exit code tells, though nobody reads the tables
        if failures is not None:
            raise RunError(failures)


def _report(config: Config, outcome: SweepOutcome, part: Part | None, progress: Progress) -> None:
    from ..analysis import rates_table, report_run, results_table, write_heatmap, write_summary_csv

    if outcome.unfinished:
        left = outcome.unfinished
        progress.print(f"part {part} is done; unfinished members of other parts: {left}. The last part writes the report.")
        return
    reference = config.sweep.reference if config.sweep else None
    write_summary_csv(outcome.path / "summary.csv", outcome.results, reference)
    subtitle = f"{config.task.kind} on {config.task.title}, base {config.model.source.rsplit('://', 1)[-1]}"
    heatmap = write_heatmap(outcome.path / "heatmap.png", outcome.results, title=config.name, subtitle=subtitle)
    report = report_run(outcome.path)
    lines = [f"compiled programs: {outcome.compiled_programs}", f"report:      {report}"]
    lines += [f"heat map:    {heatmap}"] if heatmap else []
    lines += [f"TensorBoard: tensorboard --logdir {outcome.path}"] if config.tracking.tensorboard else []
    # Last, when all files are there: whoever reads this may leave early.
    console = results_console()
    console.print(results_table(outcome.results, title=config.name, reference=reference))
    if (tuned := rates_table(outcome.results, reference=reference)) is not None:
        console.print(tuned)
    for line in lines:
        console.print(line)
