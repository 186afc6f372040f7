"""What commands share: arguments and options, and the console that results go to.

Every command file is imported for `--help`, so at the top it imports only what is quick to import. A command's body imports the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..parallel import processes

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Config keys to override: a dotted key and a YAML value, such as adapter.rank=4 or 'adapter.targets=[query, value]'.",
        show_default=False,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: rename the run directory of an earlier run instead of resuming it.")]
ExtendSteps = Annotated[
    int | None,
    typer.Option(
        "--extend-steps",
        metavar="N",
        min=1,
        help="Train N steps more than the config says. A finished run can be extended too.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Skip the confirmation for a sweep of more than 10,000 members.")]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar=processes.COORDINATOR,
        help="Address of process 0 of several. Not needed under Slurm, MPI, Kubernetes or Cloud TPU, which are detected.",
        show_default=False,
    ),
]
ProcessId = Annotated[
    int | None,
    typer.Option("--process-id", metavar="N", envvar=processes.PROCESS_ID, help="Number of this process, from 0.", show_default=False),
]
ProcessCount = Annotated[
    int | None,
    typer.Option(
        "--process-count",
        metavar="N",
        envvar=processes.PROCESS_COUNT,
        help="Number of processes. 1 runs alone, on a cluster too.",
        show_default=False,
    ),
]
StartTimeout = Annotated[
    float,
    typer.Option("--start-timeout", metavar="SECONDS", envvar=processes.START_TIMEOUT, help="How long to wait for the other processes."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


def with_extension(overrides: list[str] | None, steps: int | None) -> list[str]:
    """The overrides, with `--extend-steps` as one more."""
    return [*(overrides or []), *([] if steps is None else [f"training.extend_steps={steps}"])]


def results_console() -> Console:
    """Standard output: as wide as the terminal, or 160 columns in a file or a pipe (rich would take 80).

    No markup: what is shown are names, values and paths of the user's, in which `[INST]` and `:a:` mean just that.
    """
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
