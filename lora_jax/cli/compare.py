"""`lora-jax compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path

from .console import results_console


def compare_command(runs: list[Path]) -> None:
    """Prints one table of all members of the runs."""
    from ..analysis import compare_runs

    results_console().print(compare_runs(runs))
