"""`lora-jax bench`: size, load time, latency and peak memory of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import results_console


def bench(
    exported: Annotated[
        list[Path],
        typer.Argument(metavar="EXPORTED...", help="Folders that lora-jax export wrote, or the files in them.", show_default=False),
    ],
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Rows of a call.")] = 1,
    length: Annotated[int, typer.Option("--length", metavar="N", min=1, help="Tokens of a row. Images have a size of their own.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Calls after the first; latency is their median.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write the figures to this file too, as JSON.", show_default=False),
    ] = None,
) -> None:
    """Measure exports: size, load time, latency, peak memory.

    Each runs in a process of its own that imports its runtime alone: onnxruntime for an ONNX graph, JAX for a StableHLO program,
    lora-jax for a Hugging Face folder or a GGUF file.
    """
    import json

    from rich.table import Table

    from ..interop.bench import bench_rows, measure, runnable

    for path in exported:
        runnable(path)  # before anything is timed
    found = [measure(path, batch=batch, length=length, repeats=repeats) for path in exported]
    rows = bench_rows(found)
    table = Table(*rows[0], title=f"{batch} x {length} tokens, median of {repeats}", title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    results_console().print(table)
    if output is not None:
        output.write_text(json.dumps([one.to_json() for one in found], indent=2) + "\n", encoding="utf-8")
