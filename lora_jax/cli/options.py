"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..parallel import processes

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Config values to change: dotted keys, YAML values, such as adapter.rank=4 or 'adapter.targets=[query, value]'.",
        show_default=False,
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over: set aside what an earlier run of this name left. Without it the run is resumed.")
]
ExtendSteps = Annotated[
    int | None,
    typer.Option(
        "--extend-steps", metavar="N", min=1, help="Train N steps beyond what the config says; of a finished run too.", show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask about a sweep of more than 10,000 members.")]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar=processes.COORDINATOR,
        help="Where process 0 of several listens. Slurm, MPI, Kubernetes and Cloud TPU need none of this: they are recognized.",
        show_default=False,
    ),
]
ProcessId = Annotated[
    int | None,
    typer.Option("--process-id", metavar="N", envvar=processes.PROCESS_ID, help="This process's number, from 0.", show_default=False),
]
ProcessCount = Annotated[
    int | None,
    typer.Option(
        "--process-count",
        metavar="N",
        envvar=processes.PROCESS_COUNT,
        help="How many processes; 1: alone, on a cluster too.",
        show_default=False,
    ),
]
StartTimeout = Annotated[
    float,
    typer.Option("--start-timeout", metavar="SECONDS", envvar=processes.START_TIMEOUT, help="How long to wait for the other processes."),
]
