"""`lora-jax sweep`: all members of a grid, packed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..config.load import load_config
from ..config.schema import Config
from ..errors import InputError, RunError
from ..parallel.processes import Joining, is_writer, join
from ..sweeps.space import MANY, points
from .console import results_console

if TYPE_CHECKING:
    from ..packing.planner import Part
    from ..sweeps.run import SweepOutcome
    from ..tracking import Progress


def sweep_command(
    config: Path,
    overrides: list[str],
    *,
    solo: bool,
    fresh: bool,
    many: bool,
    part: str | None,
    plan: bool,
    retry: list[str],
    joining: Joining,
) -> None:
    """Trains a config's sweep, or a part of it, and shows what it came to; with `plan` shows what that would take and trains nothing."""
    loaded = load_config(config, overrides)
    if loaded.sweep is None:
        raise InputError(f"{config}: has no 'sweep'. Add sweep.grid or another way to name members, or run: lora-jax train {config}")
    if part is not None and fresh:
        raise InputError("--fresh: not with --part, whose run others share. Give another 'name=', or let `lora-jax launch --fresh` do it.")
    if not many and sys.stdin.isatty() and sum(1 for _ in itertools.islice(points(loaded), MANY + 1)) > MANY:
        many = typer.confirm(f"{config} names more than {MANY:,} members. Train them all?")
    if plan:
        from ..packing.planner import Part
        from .plan import plan_command

        plan_command(loaded, solo=solo, fresh=fresh, many=many, part=Part.parse(part) if part is not None else None)
        return
    run_and_report(loaded, solo=solo, fresh=fresh, many=many, part=part, retry=retry, joining=joining)


def run_and_report(
    config: Config, *, solo: bool, fresh: bool, many: bool = False, part: str | None = None, retry: Sequence[str] = (), joining: Joining
) -> None:
    """Runs, then writes heat map and report, then prints the table and where things are: of several processes, the first does so.

    Raises:
        RunError: members failed; all the rest is done.
    """
    from ..packing.planner import Part
    from ..sweeps.failures import told_failures
    from ..sweeps.run import run_sweep
    from ..tracking import Progress

    share = Part.parse(part) if part is not None else None
    join(joining)
    progress = Progress(enabled=is_writer())
    outcome = run_sweep(config, solo=solo, fresh=fresh, many=many, part=share, retry=retry, progress=progress)
    if not is_writer():
        return
    _report(config, outcome, share, progress)
    if (failures := told_failures(outcome.results)) is not None:
        raise RunError(failures)


def _report(config: Config, outcome: SweepOutcome, share: Part | None, progress: Progress) -> None:
    from ..analysis import rates_table, report_run, results_table, write_heatmap, write_summary_csv

    if outcome.unfinished:
        left = outcome.unfinished
        progress.print(f"part {share} is done; members of other parts yet to end: {left}. The last part writes the report.")
        return
    console = results_console()
    reference = config.sweep.reference if config.sweep else None
    console.print(results_table(outcome.results, title=config.name, reference=reference))
    if (tuned := rates_table(outcome.results, reference=reference)) is not None:
        console.print(tuned)
    write_summary_csv(outcome.path / "summary.csv", outcome.results, reference)
    subtitle = f"{config.task.kind} on {config.task.source.rsplit('/', 1)[-1]}, base {config.model.source.rsplit('://', 1)[-1]}"
    heatmap = write_heatmap(outcome.path / "heatmap.png", outcome.results, title=config.name, subtitle=subtitle)
    report = report_run(outcome.path)
    lines = [f"compiled programs: {outcome.compiled_programs}", f"report:      {report}"]
    lines += [f"heat map:    {heatmap}"] if heatmap else []
    lines += [f"TensorBoard: tensorboard --logdir {outcome.path}"] if config.tracking.tensorboard else []
    for line in lines:
        console.print(line, markup=False)
