"""`lora-jax compare`: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import results_console


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, such as runs/quickstart.", show_default=False)],
    metric: Annotated[str | None, typer.Option("--metric", metavar="NAME", help="The metric to compare by, such as loss.")] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference", metavar="KEY=VALUE", help="Compare with the members that have this value. Repeatable. Default: the best setting."
        ),
    ] = None,
) -> None:
    """Compare finished runs.

    Prints a table of all members, with confidence intervals over seeds and differences paired by seed. Members are paired only if they
    trained on the same data for the same number of steps. A second table shows each setting at its best learning rate.
    """
    from ..analysis import compare_runs

    for table in compare_runs(runs, metric, _reference(reference or [])):
        results_console().print(table)


def _reference(pairs: list[str]) -> dict[str, Any]:
    from ..config.messages import split_key
    from ..config.yaml import parse

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
