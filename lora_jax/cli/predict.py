"""`lora-jax predict`: what a member of a run says of the rows of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import RunPath


def predict(
    run: RunPath,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="FILE",
            help="Rows with the columns that the run's task reads, in the forms of task.source. What is right need not be said.",
            show_default=False,
        ),
    ],
    member: Annotated[
        str | None,
        typer.Option("--member", metavar="NAME", help="A member of a sweep. Default: the best finished one.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The file to write. Default: predictions.jsonl in the member's folder. An existing file is not overwritten.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Rows at a time.")] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="The largest number of new tokens of a generated text. Default: task.max_new_tokens, or 128 without such a key.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Predict the rows of a file with a trained member.

    Writes a line of JSON per row: row (its number in the file), input, reference, output, score.
    Texts are generated as in the run's evaluations.
    """
    from ..analysis.compare import choose_member
    from ..sweeps.predict import predict_member
    from ..tracking import Progress, member_folder

    progress = Progress()
    run, chosen, why = choose_member(run, member)
    progress.print(f"member {chosen.name}" + (f" ({why})" if why else ""))
    path = run / member_folder(chosen.name) / "predictions.jsonl" if output is None else output
    done = predict_member(run, chosen, source, path, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress)
    print(f"{done.path}: {done.rows:,} rows" + ("" if done.score is None else f", mean score {done.score:.4f}"))
