"""`lora-jax evaluate`: the metrics of a run's saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import RunPath, results_console


def evaluate(
    run: RunPath,
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="A member of a sweep. Default: all.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="The rows to use: eval (held out), test or train.")] = "eval",
    base: Annotated[bool, typer.Option("--base", help="Also evaluate the base alone, without what was trained.")] = False,
) -> None:
    """Evaluate the saved adapters of a run.

    Loads the base and each member's saved adapter, and prints the metrics of the task. Of a sweep, the best member is marked:
    the one that `export` and `generate` take.
    """
    from rich.table import Table
    from rich.text import Text

    from ..sweeps.restore import evaluate_run
    from ..tasks.evaluators import EVALUATORS
    from ..tracking import Progress
    from ..tracking.results import union

    results = evaluate_run(run, member=member, split=split, progress=Progress(), base=base)
    best, why = _best_of(run) if len(results) > 1 + base else (None, None)
    metrics = [EVALUATORS.get(name, "metric") for name in union(results.values())]
    caption = Text(why, style="dim") if why else None
    table = Table(title=Text(f"{run} ({split})", style="table.title"), caption=caption, caption_justify="left")
    table.add_column("member")
    for metric in metrics:
        table.add_column(Text(metric.heading), justify="right")
    for name, values in results.items():
        figures = (metric.format(values[metric.name]) if metric.name in values else "" for metric in metrics)
        table.add_row(Text(name + (" *" if name == best else "")), *figures, style="bold green" if name == best else None)
    results_console().print(table)


def _best_of(run: Path) -> tuple[str | None, str]:
    """The run's best member by what it recorded when it was trained, None where there is none; and what is to be told of that."""
    from ..analysis.compare import best_of_run
    from ..sweeps.restore import run_members

    try:
        best = best_of_run(run, run_members(run))
    except InputError as error:
        return None, f"No member is marked as best: {error}"
    return (best[0], f"* {best[1]} (as recorded in training)") if best else (None, "No member has finished: none is marked as best.")
