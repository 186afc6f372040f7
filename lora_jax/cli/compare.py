"""`lora-jax compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.messages import split_key
from ..config.yaml import parse
from ..errors import InputError
from .console import results_console


def compare_command(runs: list[Path], metric: str | None, reference: list[str]) -> None:
    """Prints one table of all members of the runs, and one of each setting at its best learning rate."""
    from ..analysis import compare_runs

    for table in compare_runs(runs, metric, _reference(reference)):
        results_console().print(table)


def _reference(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"--reference: '{pair}' is not key=value, such as adapter.rank=1.")
        try:
            split_key(key)
        except InputError as error:
            raise InputError(f"--reference: {error}") from None
        found[key] = parse(text, "--reference")[0]
    return found
