"""`lora-jax compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def compare_command(runs: list[Path]) -> None:
    """Prints one table of all members of the runs."""
    from ..analysis import compare_runs

    Console(soft_wrap=True, highlight=False).print(compare_runs(runs))
