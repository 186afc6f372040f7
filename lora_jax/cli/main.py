"""The `lora-jax` command: puts the commands together, and prints failures.

A command's body imports what it needs (and with it JAX) when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from ..errors import InputError, InputWarning, RunError, Stopped
from ..parallel import processes
from .bench import bench
from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .export import ExportHelp, export
from .generate import generate
from .launch import launch
from .options import guard_streams
from .predict import predict
from .schema import schema
from .sweep import sweep, train

app = typer.Typer(
    name="lora-jax",
    help="Train and compare low-rank adapters over one frozen base model, many at a time.",
    epilog="Start with: lora-jax doctor, then lora-jax sweep configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help is plain text: [a, b] in it is a YAML list and not markup
    pretty_exceptions_enable=False,  # main(), below, prints failures
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (train, sweep, launch, compare, evaluate, predict, generate, export, bench, doctor, schema):
    app.command(cls=ExportHelp if _command is export else None)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-jax {importlib.metadata.version('lora-jax')}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Options of the command as a whole; `--version` exits before any command runs."""


def main() -> None:
    """Runs the command line.

    Exit codes: 0 success, 1 failure while running, 2 wrong input, 75 stopped by SIGTERM, 130 stopped by Ctrl-C, 141 where whoever reads
    the output left early (`| head`).
    """
    guard_streams()
    try:
        try:
            with warnings.catch_warnings():
                _print_warnings()
                app()
        finally:
            sys.stdout.flush()  # what cannot be written is told here, and not when the interpreter ends
    except Stopped as stopped:
        print(f"{stopped}; everything is saved. The same command resumes the run.", file=sys.stderr)
        sys.exit(130 if stopped.signal == signal.SIGINT else 75)
    except Exception as error:
        if os.environ.get("LORA_JAX_TRACEBACK"):
            raise
        # Plain text without wrapping: paths and keys in a message can be copied and searched for.
        print(f"error: {_message(error)}", file=sys.stderr)
        wrong = isinstance(error, InputError) or (isinstance(error, OSError) and error.errno in _WRONG_PATH)
        processes.leave(2 if wrong else 1)


# What no path can be that names a file; and what a file system refuses, which no code of ours can foresee at each of its reads and writes.
_WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EIO, errno.ESTALE)


def _print_warnings() -> None:
    """What is said of an input goes to stderr as one plain line, without the place in our code that says it."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
        if issubclass(category, InputWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *rest, **options)

    warnings.showwarning = show
    warnings.simplefilter("default", InputWarning)  # whatever PYTHONWARNINGS says


def _message(error: Exception) -> str:
    if isinstance(error, (InputError, RunError)):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno in (*_WRONG_PATH, *_REFUSED):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
        return f"{name if len(name) <= 200 else name[:197] + '...'}: {error.strerror}."
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}\nThis error is unexpected. Set LORA_JAX_TRACEBACK=1 to see the traceback."


if __name__ == "__main__":
    main()
