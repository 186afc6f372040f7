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

    from ..sweeps.restore import evaluate_run
    from ..tracking import Progress

    results = evaluate_run(run, member=member, split=split, progress=Progress())
    metrics = list(next(iter(results.values())))
    table = Table(title=f"{run} ({split})")
    table.add_column("member")
    for name in metrics:
        table.add_column(name, justify="right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[m]:.4f}" for m in metrics))
    results_console().print(table)
