"""`lora-jax evaluate`: a run's saved adapters, again."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .console import results_console


def evaluate_command(run: Path, *, member: str | None, split: str) -> None:
    """Prints the metrics of a run's saved adapters."""
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
