"""`lora-jax export`: a member of a run, written in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from ..errors import InputError
from .options import results_console


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN[/MEMBER]", help="A run directory, or the folder of a member in it.", show_default=False)
    ],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="Name of an exporter; the list is below.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder. Default: FORMAT in the member's folder.", show_default=False),
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--member", metavar="NAME", help="A member of a sweep. Default: the best finished one.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Dtype of the weights. Default: that of the base's files.", show_default=False),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="The largest size of a weights file. Default: 5GB.", show_default=False),
    ] = None,
    keep_base: Annotated[
        bool,
        typer.Option(
            "--keep-base", help="Leave out of the base what the adapter's init took out of it (PiSSA, ...), and write that base beside it."
        ),
    ] = False,
    keep_mask: Annotated[
        bool,
        typer.Option("--keep-mask", help="Merged weights stay 0 where a pruned base's are, and what that changes is told."),
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round merged weights of a quantised base to its format again, and tell what that changes. Default: dequantised.",
        ),
    ] = False,
) -> None:
    """Export a member of a run for other programs.

    Uses the member's best adapter if it was saved, else its final one. Weights are merged in float32 and rounded once. A README.md
    records how the member was trained. An existing folder is never overwritten.
    """
    from ..config.types import size_text, to_bytes
    from ..interop.export import ExportOptions, export_run

    try:
        limit = None if max_shard_size is None else to_bytes(max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size: {error}.") from None
    options = ExportOptions(dtype, limit, keep_base or None, keep_mask or None, requantize or None)
    done = export_run(run, form=form, out=out, member=member, options=options)
    console = results_console()
    why = f" ({done.reason})" if done.reason else ""
    console.print(f"{done.member}{why}, the {done.adapter} adapter: {done.folder}")
    for file in sorted(done.folder.iterdir()):
        console.print(f"  {file.name}  {size_text(file.stat().st_size)}")


class ExportHelp(typer.core.TyperCommand):
    """A command whose `--help` ends with the list of exporters, those of other packages included."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Imports the exporters, so only `lora-jax export --help` waits for them."""
        from ..interop.export import format_list

        with formatter.section("Formats"):
            formatter.write_dl(format_list())
