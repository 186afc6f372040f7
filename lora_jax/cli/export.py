"""`lora-jax export`: a run's best member in the format of an exporter."""

from __future__ import annotations

from pathlib import Path

import click
import typer.core

from ..config.types import size_text, to_bytes
from ..errors import InputError
from .console import results_console


def export_command(
    run: Path, *, form: str | None, out: Path | None, member: str | None, dtype: str | None, max_shard_size: str | None
) -> None:
    """Writes a member of a run, and prints the folder and its files."""
    from ..interop.base import ExportOptions
    from ..interop.export import export_run

    try:
        limit = None if max_shard_size is None else to_bytes(max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size: {error}.") from None
    done = export_run(run, form=form, out=out, member=member, options=ExportOptions(dtype, limit))
    console = results_console()
    why = f" ({done.reason})" if done.reason else ""
    console.print(f"{done.member}{why}, the {done.adapter} adapter: {done.folder}", markup=False, highlight=False, soft_wrap=True)
    for file in sorted(done.folder.iterdir()):
        console.print(f"  {file.name}  {size_text(file.stat().st_size)}", markup=False, highlight=False, soft_wrap=True)


class ExportHelp(typer.core.TyperCommand):
    """A command whose `--help` ends with the list of exporters, those of other packages among them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Imports the exporters, so `lora-jax export --help` alone waits for them."""
        from ..interop.export import format_list

        with formatter.section("Formats"):
            formatter.write_dl(format_list())
