"""What TensorBoard shows beside curves: samples of generated texts as a Markdown table, and the confusion matrix as an image."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

# The file in a member's folder with a few examples and what it answered at its last evaluation.
PICTURE = "predictions.png"
# Samples of a panel, and characters of a text in it.
SAMPLES, CHARACTERS = 6, 1200
# With more classes than this their names and counts could not be read.
NAMED_CLASSES = 30


def samples_table(inputs: Sequence[str], references: Sequence[Sequence[str]], outputs: Sequence[str]) -> str:
    """The first rows: what was asked, what is right, and what was generated.

    >>> print(samples_table(["2 + 2 ="], [["4"]], ["5 | 6"]))
    | input | reference | output |
    | --- | --- | --- |
    | 2 + 2 = | 4 | 5 \\| 6 |
    """
    rows = zip(inputs[:SAMPLES], references[:SAMPLES], outputs[:SAMPLES], strict=True)
    lines = [f"| {_cell(asked)} | {_cell(' / '.join(right))} | {_cell(given)} |" for asked, right, given in rows]
    return "\n".join(["| input | reference | output |", "| --- | --- | --- |", *lines])


def _cell(text: str) -> str:
    short = text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ..."
    for plain, shown in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        short = short.replace(plain, shown)
    return short


def confusion_png(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """The confusion matrix: each row's shades are fractions of that class, its figures counts.

    Args:
        counts: (classes, classes), the right class down, the predicted one across.
        classes: their names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    named = len(classes) <= NAMED_CLASSES
    side = 1.6 + (0.42 if named else 0.06) * len(classes)
    figure = Figure(figsize=(side + 0.6, side), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    if named:
        short = [name if len(name) <= 16 else name[:15] + "\u2026" for name in classes]
        axes.set_xticks(range(len(classes)), short, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(classes)), short, fontsize=8, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                ink = "white" if share[row, column] > 0.6 else "black"
                axes.text(column, row, f"{int(count):,}", ha="center", va="center", fontsize=7, color=ink)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
