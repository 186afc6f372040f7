"""Tables for the terminal: the members of one run, or several runs beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from lora_jax.analysis.compare import Estimate, Row, footnotes, mark_best, rows_of
from lora_jax.analysis.metrics import Metric, find_metric, primary_metric, short_names, short_value
from lora_jax.config.errors import InputError
from lora_jax.tracking.results import MemberResult, read_run, union
from lora_jax.tracking.rundir import differences


def results_table(results: Sequence[MemberResult], metric: Metric | str | None = None, *, title: str | None = None) -> Table:
    """One row a setting (seeds averaged): swept keys, trainable parameters, final and best metric, difference to the best.

    Args:
        results: The members of one run.
        metric: What to compare by; accuracy, perplexity or loss by default, whichever comes first in `results`.
        title: Shown above.
    """
    metric = find_metric(metric, results) if isinstance(metric, str) else metric or primary_metric(results)
    rows = mark_best(rows_of(results, metric), metric)
    return _table(rows, metric, title, footnotes(results, rows))


def compare_runs(dirs: Sequence[Path | str], metric: str | None = None) -> Table:
    """The members of several run directories in one table, with every key that any of them swept.

    A run that did not sweep a key shows the one value its config has for it.

    Args:
        dirs: Run directories.
        metric: As in `results_table`; it has to be common to all runs.

    Raises:
        InputError: A directory is missing or damaged, or the runs have no metric in common.
    """
    paths = [Path(d) for d in dirs]
    if not paths:
        raise InputError("name at least one run directory")
    every = {path: read_run(path) for path in paths}
    results = [r for some in every.values() for r in some]
    chosen = find_metric(metric, results) if metric else primary_metric(results)
    keys = union(r.settings for r in results)
    configs = {path: _read_config(path) for path in paths}
    repeated = len({p.resolve().name for p in paths}) < len(every)
    rows: list[Row] = []
    for path, some in every.items():
        run = "/".join(path.resolve().parts[-2:]) if repeated else path.resolve().name
        for row in rows_of(some, chosen, run=run):
            row.settings.update({k: _look_up(configs[path], k) for k in keys if k != "training.seed" and k not in row.settings})
            rows.append(row)
    rows = mark_best(rows, chosen)
    notes = footnotes([MemberResult(r.run, r.settings, 0, "finished", {}) for r in rows], rows)
    return _table(rows, chosen, None, notes + _unlike(configs, keys))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path / 'config.yaml'}: cannot be read ({error})") from None
    return config if isinstance(config, dict) else {}


def _look_up(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = config.get(word) if isinstance(config, dict) else None
    return config


def _unlike(configs: dict[Path, dict[str, Any]], swept: Sequence[str]) -> list[str]:
    """A note on what else differs between the runs: a comparison across unlike tasks or lengths is not one of the swept keys."""
    first, *others = configs.values()
    ignored = ("name", "sweep", "tracking")
    found = {key for other in others for key in differences(first, other) if key.split(".")[0] not in ignored and key not in swept}
    shown = sorted(found)[:8]
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return [f"The runs' configs also differ in: {', '.join(shown)}{more}."] if shown else []


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """Swept key -> column heading, in words."""
    return {key: name.replace("_", " ") for key, name in short_names(union(row.settings for row in rows)).items()}


def estimate_text(estimate: Estimate, metric: Metric, *, signed: bool = False) -> str:
    """`87.3`, or over several seeds `87.3 ± 0.4`; the unit is in the heading."""
    mean = metric.format(estimate.mean, signed=signed)
    return mean if estimate.half_width is None else f"{mean} ± {metric.format(estimate.half_width)}"


def best_step_text(row: Row) -> str:
    steps = [m.best_step for m in row.members if m.best_step is not None]
    return "" if not steps else f"{steps[0]}" if len(set(steps)) == 1 else f"{min(steps)}-{max(steps)}"


def _table(rows: Sequence[Row], metric: Metric, title: str | None, notes: Sequence[str]) -> Table:
    has_run, has_seeds = any(row.run for row in rows), any(len(row.members) > 1 for row in rows)
    has_steps, has_difference = any(best_step_text(row) for row in rows), any(row.difference for row in rows)
    caption = "\n".join(["* best", *notes] if any(row.is_best for row in rows) else notes)
    table = Table(title=title, caption=caption or None, caption_justify="left", caption_style="dim", header_style="bold")
    if has_run:
        table.add_column("run")
    keys = columns(rows)
    if not keys and not has_run:
        table.add_column("member")
    for key, heading in keys.items():
        numeric = all(isinstance(row.settings.get(key), (int, float)) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left")
    if has_seeds:
        table.add_column("seeds", justify="right")
    for heading in ("parameters", f"final {metric.heading}", f"best {metric.heading}"):
        table.add_column(heading, justify="right", no_wrap=heading == "parameters")
    if has_steps:
        table.add_column("at step", justify="right")
    if has_difference:
        table.add_column("to best", justify="right")
    for row in rows:
        cells: list[str | Text] = [row.run] if has_run else []
        cells += [short_value(row.settings.get(key)) for key in keys] if keys or has_run else [row.members[0].name]
        cells += [str(len(row.members))] if has_seeds else []
        cells += [f"{row.parameters:,}", _final(row, metric), "" if row.final.count == 0 else estimate_text(row.best, metric)]
        cells += [best_step_text(row)] if has_steps else []
        cells += [estimate_text(row.difference, metric, signed=True) if row.difference else ""] if has_difference else []
        table.add_row(*cells, style="bold green" if row.is_best else None)
    return table


def _final(row: Row, metric: Metric) -> Text:
    figure = "" if math.isnan(row.final.mean) else estimate_text(row.final, metric)
    if row.unfinished:
        return Text.assemble((row.unfinished, "red"), f" {figure}" if figure else "")
    return Text(figure + (" *" if row.is_best else "  "))
