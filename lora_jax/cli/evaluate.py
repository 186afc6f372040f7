"""`lora-jax evaluate`: the metrics of a run's saved adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import RunPath, results_console


def evaluate(
    run: RunPath,
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="A member of a sweep. Default: all.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="The rows to use: eval (held out) or train.")] = "eval",
) -> None:
    """Evaluate the saved adapters of a run.

    Loads the base and each member's saved adapter, and prints the metrics of the task.
    """
    from rich.table import Table
    from rich.text import Text

    from ..sweeps.restore import evaluate_run
    from ..tasks.evaluators import EVALUATORS
    from ..tracking import Progress
    from ..tracking.results import union

    results = evaluate_run(run, member=member, split=split, progress=Progress())
    metrics = [EVALUATORS.get(name, "metric") for name in union(results.values())]
    table = Table(title=Text(f"{run} ({split})", style="table.title"))
    table.add_column("member")
    for metric in metrics:
        table.add_column(Text(metric.heading), justify="right")
    for name, values in results.items():
        table.add_row(Text(name), *(metric.format(values[metric.name]) if metric.name in values else "" for metric in metrics))
    results_console().print(table)
