"""`lora-jax export`: a member of a run, written in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import results_console


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN[/MEMBER]", help="A run directory, or the folder of a member in it.", show_default=False)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="FORMAT", help="hf: merged weights, config and tokenizer for transformers. peft: only the adapter."
        ),
    ] = "hf",
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
        typer.Option(
            "--dtype", metavar="DTYPE", help="hf: float32, bfloat16 or float16. Default: the dtype of the base's files.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="hf: the largest size of a weights file.")
    ] = "5GB",
) -> None:
    """Export a member of a run for other programs.

    Uses the member's best adapter if it was saved, else its final one. Weights are merged in float32 and rounded once. A README.md
    records how the member was trained. An existing folder is never overwritten.
    """
    from ..config.types import size_text, to_bytes
    from ..interop.export import export_run

    try:
        limit = to_bytes(max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size: {error}.") from None
    done = export_run(run, form=form, out=out, member=member, dtype=dtype, largest=limit)
    console = results_console()
    why = f" ({done.reason})" if done.reason else ""
    console.print(f"{done.member}{why}, the {done.adapter} adapter: {done.folder}", markup=False, highlight=False, soft_wrap=True)
    for file in sorted(done.folder.iterdir()):
        console.print(f"  {file.name}  {size_text(file.stat().st_size)}", markup=False, highlight=False, soft_wrap=True)
