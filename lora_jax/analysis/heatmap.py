"""A heat map of the metric over two swept keys, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # no pyplot: it keeps global state and may open a window
from matplotlib.patches import Rectangle

from ..errors import InputError, hint
from ..tasks.evaluators import Evaluator
from ..tracking.files import write_atomic
from ..tracking.results import MemberResult, union
from .metrics import LEARNING_RATE, SEED, identity, ordered_values, primary_metric, short_names, short_value

DPI = 200  # twice the usual 100, for a sharp picture in a README
_INK, _FAINT, _EMPTY = "#1f2328", "#656d76", "#eceff2"


def choose_axes(results: Sequence[MemberResult], x_key: str | None = None, y_key: str | None = None) -> tuple[str | None, str | None]:
    """The keys along x and y: those given, else rank and targets, else those with most values (the seed never by itself).

    Raises:
        InputError: A key was given that was not swept.
    """
    counts = {key: len(ordered_values(key, results)) for key in union(r.settings for r in results)}
    for key in (x_key, y_key):
        if key is not None and key not in counts:
            raise InputError(f"'{key}' was not swept. {hint(key, counts)}")
    liked = ("adapter.rank", "adapter.targets")
    swept = [key for key in counts if counts[key] > 1 and key not in (SEED, x_key, y_key)]
    swept.sort(key=lambda key: (key not in liked, liked.index(key) if key in liked else -counts[key]))
    x = x_key or (swept.pop(0) if swept else None)
    y = y_key or (swept.pop(0) if swept else None)
    return (x, y) if x is not None else (y, None)


def grid_of(results: Sequence[MemberResult], x_key: str, y_key: str | None, metric: Evaluator) -> tuple[np.ndarray, list[Any], list[Any]]:
    """The final metric in each cell: (y values, x values) float64, the x values and the y values; NaN where nothing finished.

    Each cell is the mean over the other keys, except the learning rate, of which it takes the best: a learning rate is
    there to be tuned, and one that is too large would spoil the mean of a setting that is good at its own. A learning
    rate at which a member diverged is not taken unless all did.
    """
    xs, ys = ordered_values(x_key, results), ordered_values(y_key, results) if y_key else [None]
    cells = np.full((len(ys), len(xs)), np.nan)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            rates: dict[str, list[float]] = {}
            for r in results:
                if _has(r, x_key, x) and (y_key is None or _has(r, y_key, y)):
                    value = r.final.get(metric.name, math.nan) if r.status == "finished" else math.nan
                    rates.setdefault(identity(r.settings.get(LEARNING_RATE)), []).append(value)
            means = [float(np.mean(values)) for values in rates.values()]  # NaN if one of them did not finish
            means = [m for m in means if not math.isnan(m)]
            if means:
                cells[row, column] = max(means) if metric.larger_is_better else min(means)
    return cells, xs, ys


def _has(result: MemberResult, key: str, value: Any) -> bool:
    return key in result.settings and identity(result.settings[key]) == identity(value)


def write_heatmap(
    path: Path | str,
    results: Sequence[MemberResult],
    x_key: str | None = None,
    y_key: str | None = None,
    metric: Evaluator | None = None,
    *,
    title: str = "",
    subtitle: str = "",
) -> Path | None:
    """Writes the heat map as a PNG.

    Args:
        path: The file.
        results: The members of one run.
        x_key: Swept key along x; see `choose_axes` for the defaults.
        y_key: Swept key along y; without a second swept key the map has one row.
        metric: What is shown; `primary_metric` by default.
        title: The run's name.
        subtitle: Base, task and steps, say. How other swept keys were taken together is added to it.

    Returns:
        `path`, or None where nothing was swept, or no member finished: then no file is written.
    """
    png = heatmap_png(results, x_key, y_key, metric, title=title, subtitle=subtitle)
    return None if png is None else write_atomic(path, png)


def heatmap_png(
    results: Sequence[MemberResult],
    x_key: str | None = None,
    y_key: str | None = None,
    metric: Evaluator | None = None,
    *,
    title: str = "",
    subtitle: str = "",
) -> bytes | None:
    """The PNG of `write_heatmap` as bytes."""
    x, y = choose_axes(results, x_key, y_key)
    if x is None:
        return None
    metric = metric or primary_metric(results)
    cells, xs, ys = grid_of(results, x, y, metric)
    if np.isnan(cells).all():
        return None
    lines = [line for line in (subtitle, _reduction(results, x, y)) if line]
    endings = [[_ending(results, x, a, y, b) for a in xs] for b in ys]
    # Settings are looked for on the map, so it shows what they are chosen by: no test rows.
    heading = f"validation {metric.heading}" if any(r.test for r in results) else metric.heading
    return _draw(cells, endings, xs, ys, x, y, metric, f"{title}: {heading}" if title else heading, lines)


def _reduction(results: Sequence[MemberResult], x: str, y: str | None) -> str:
    """How the keys that are not on an axis were taken together, in words."""
    others = [k for k in union(r.settings for r in results) if k not in (x, y) and len(ordered_values(k, results)) > 1]
    short = short_names(others)
    parts = []
    if LEARNING_RATE in others:
        parts.append(f"best of {len(ordered_values(LEARNING_RATE, results))} learning rates")
    rest = [f"{len(ordered_values(SEED, results))} seeds" if k == SEED else short[k] for k in others if k != LEARNING_RATE]
    if rest:
        parts.append("mean over " + ", ".join(rest))
    return ", ".join(parts)


def _ending(results: Sequence[MemberResult], x_key: str, x: Any, y_key: str | None, y: Any) -> str:
    """What a cell without a value says: how its members ended, in a word where all of them ended so."""
    endings = {r.status for r in results if _has(r, x_key, x) and (y_key is None or _has(r, y_key, y)) and r.status != "finished"}
    return endings.pop() if len(endings) == 1 else "no result"


def _draw(
    cells: np.ndarray,
    endings: list[list[str]],
    xs: list[Any],
    ys: list[Any],
    x: str,
    y: str | None,
    metric: Evaluator,
    title: str,
    lines: list[str],
) -> bytes:
    """All sizes are in inches, so that cells and letters keep theirs however many there are.

    Names and values are no formulas: matplotlib would take what stands between two `$` for one, and fail at `q$|k$`.
    """
    y_labels, x_labels = [short_value(v) for v in ys] if y else [""], [short_value(v, 16) for v in xs]
    wide = max(0.95, 0.085 * max(len(text) for text in x_labels) + 0.3)
    left = 0.55 + 0.077 * max(len(text) for text in y_labels) if y else 0.3
    top, bottom, right = 0.62 + 0.2 * len(lines), 0.72, 1.12
    width, height = wide * len(xs), 0.62 * len(ys)
    total_width = max(left + width + right, 0.3 + 0.105 * len(title), 0.3 + 0.076 * max([len(t) for t in lines], default=0))
    total_height = top + height + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))

    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
    # Bright is better, whichever the direction. cividis reads the same with the common kinds of colour blindness.
    base = colormaps["cividis"] if metric.larger_is_better else colormaps["cividis_r"]
    colours = base.with_extremes(bad=_EMPTY)
    span = (low, high) if high > low else (low - 0.5, high + 0.5)
    image = axes.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=span[0], vmax=span[1], aspect="auto")
    best = np.unravel_index(np.nanargmax(cells) if metric.larger_is_better else np.nanargmin(cells), cells.shape)
    for row, column in np.ndindex(*cells.shape):
        value, is_best = cells[row, column], (row, column) == tuple(best)
        if np.isnan(value):
            axes.text(column, row, endings[row][column], ha="center", va="center", fontsize=8, color=_FAINT)
            continue
        linear = np.asarray(image.cmap(image.norm(value))[:3]) ** 2.2
        ink = _INK if linear @ (0.2126, 0.7152, 0.0722) > 0.18 else "white"  # whichever has more contrast (WCAG luminance)
        weight = "bold" if is_best else "normal"
        axes.text(column, row, metric.format(float(value)), ha="center", va="center", fontsize=10, color=ink, weight=weight)
    axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="#d1242f", linewidth=2.2, clip_on=False, zorder=5))
    _tidy(axes, len(xs), len(ys))
    names = short_names([k for k in (x, y) if k])
    axes.set_xticks(range(len(xs)), x_labels, fontsize=9.5, color=_INK, parse_math=False)
    axes.set_yticks(range(len(ys)) if y else [], y_labels if y else [], fontsize=9.5, color=_INK, parse_math=False)
    axes.set_xlabel(names[x].replace("_", " "), fontsize=10, color=_FAINT, labelpad=5)
    if y:
        axes.set_ylabel(names[y].replace("_", " "), fontsize=10, color=_FAINT, labelpad=7)

    figure.text(0.15 / total_width, 1 - 0.17 / total_height, title, fontsize=12.5, weight="bold", color=_INK, va="top", parse_math=False)
    for index, line in enumerate(lines):
        figure.text(0.15 / total_width, 1 - (0.43 + 0.2 * index) / total_height, line, fontsize=9, color=_FAINT, va="top", parse_math=False)
    if high > low:
        place = ((left + width + 0.18) / total_width, bottom / total_height, 0.11 / total_width, height / total_height)
        bar = figure.colorbar(image, cax=figure.add_axes(place))
        if not metric.larger_is_better:
            bar.ax.invert_yaxis()  # the better end on top
        bar.outline.set_visible(False)
        bar.set_ticks([low, high], labels=[metric.format(low), metric.format(high)])
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=_FAINT, pad=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _tidy(axes: Any, columns: int, rows: int) -> None:
    """Thin white lines between the cells, and no frame or tick marks."""
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
