"""What commands share: arguments and options, and the console that results go to.

Every command file is imported for `--help`, so at the top it imports only what is quick to import. A command's body imports the rest.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from ..errors import RunError
from ..parallel import processes

READER_GONE = 141  # what a shell calls a program that SIGPIPE ended

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
        help="Number of processes. With 1 the command runs alone, even on a cluster.",
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


class _Output(io.FileIO):
    """Standard output or error, whose reader may leave early (`| head`) and whose disk may be full.

    What was to be written is then lost, and nothing more is tried. Results that nobody reads end the command; progress does not, for
    whoever closes a log need not mean the training.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            null, number = os.open(os.devnull, os.O_WRONLY), self.fileno()
            os.dup2(null, number)
            os.close(null)
            if number == 2:
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                raise SystemExit(READER_GONE) from None
            raise RunError(f"cannot write to standard output ({error.strerror}).") from None


def guard_streams() -> None:
    """Makes standard input, output and error usable, whatever the caller made of them: closed, a broken pipe, or ASCII only."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file to be opened would be standard output
        pass
    os.close(spare)
    closed = sys.stdout is None
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout, sys.stderr = _guarded(sys.stdout, 1), _guarded(sys.stderr, 2)
    if closed:
        print("warning: standard output is closed; what this command prints there is lost.", file=sys.stderr)


def _guarded(stream: Any, number: int) -> TextIO:
    encoding, unbuffered = "utf-8", False
    if stream is not None:
        if type(stream) is not io.TextIOWrapper or not _has_number(stream, number):
            return stream  # a test's, or a notebook's
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if isinstance(raw, _Output):
            return stream
        stream.flush()
        encoding, unbuffered = stream.encoding, raw is stream.buffer  # PYTHONUNBUFFERED
    file: Any = _Output(number, "w", closefd=False)
    lines = file.isatty() or number == 2
    # A character that the encoding lacks is written as an escape: `\xb1` for the `±` of a table.
    return io.TextIOWrapper(
        file if unbuffered else io.BufferedWriter(file),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
        write_through=unbuffered,
    )


def _has_number(stream: io.TextIOWrapper, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False
