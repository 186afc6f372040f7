"""Tables for the terminal, of the members of one run or several runs beside each other; and `summary.csv`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..tasks.evaluators import Evaluator
from ..tracking.results import MemberResult, cell, read_run, union, write_table
from ..tracking.rundir import differences
from .compare import LEARNING_RATE, Estimate, Row, best_rates, footnotes, mark_best, rate_notes, rows_of, tested, tuned_rows
from .metrics import SEED, find_metric, identity, primary_metric, short_names, short_value


def results_table(
    results: Sequence[MemberResult],
    metric: Evaluator | str | None = None,
    *,
    title: str | None = None,
    reference: Mapping[str, Any] | None = None,
) -> Table:
    """One row a setting (seeds averaged): swept keys, trainable parameters, final and best metric, difference to the best.

    Args:
        results: The members of one run.
        metric: What to compare by; accuracy, perplexity or loss by default, whichever comes first in `results`.
        title: Shown above.
        reference: Swept key -> value: differences are to the members with these values; see `mark_best`. To the best by default.
    """
    metric = find_metric(metric, results) if isinstance(metric, str) else metric or primary_metric(results)
    rows = mark_best(rows_of(results, metric), metric, reference)
    return _table(rows, metric, title, footnotes(results, rows), reference)


def rates_table(
    results: Sequence[MemberResult], metric: Evaluator | str | None = None, *, reference: Mapping[str, Any] | None = None
) -> Table | None:
    """The same of each setting at its best learning rate; None where no setting has two rates, or nothing else was swept."""
    metric = find_metric(metric, results) if isinstance(metric, str) else metric or primary_metric(results)
    rows = rows_of(results, metric)
    chosen = tuned_rows(rows, metric, reference)
    return _table(chosen, metric, "each at its best learning rate", rate_notes(chosen, rows), reference) if chosen else None


def compare_runs(dirs: Sequence[Path | str], metric: str | None = None, reference: Mapping[str, Any] | None = None) -> list[Table]:
    """The members of several run directories in one table, with every key that any of them swept; and each at its best learning rate.

    A run that did not sweep a key shows the one value its config has for it. Members of different runs are paired by seed where both
    trained on the same data, in the same order, for as many steps; elsewhere no difference is given.

    Args:
        dirs: Run directories.
        metric: As in `results_table`; it has to be common to all runs.
        reference: As in `results_table`.

    Raises:
        InputError: A directory is missing or damaged, or the runs have no metric in common; or nobody has the reference's values.
    """
    if SEED in (reference or {}):
        raise InputError(f"--reference: '{SEED}' cannot be the reference, because seeds are paired.")
    paths = [Path(d) for d in dirs]
    if not paths:
        raise InputError("name at least one run directory")
    every = {path: read_run(path) for path in paths}
    results = [r for some in every.values() for r in some]
    chosen = find_metric(metric, results) if metric else primary_metric(results)
    configs = {path: read_config(path) for path in paths}
    keys = union([*(r.settings for r in results), *([reference] if reference else [])])
    rates = [flat(config).get(LEARNING_RATE) for config in configs.values()]
    if None not in rates and len(set(map(identity, rates))) > 1:
        keys = list(dict.fromkeys([*keys, LEARNING_RATE]))  # runs at different rates are not compared at a single one
    repeated = len({p.resolve().name for p in paths}) < len(every)
    rows: list[Row] = []
    for path, some in every.items():
        run = "/".join(path.resolve().parts[-2:]) if repeated else path.resolve().name
        config = flat(configs[path])
        own = {k: config.get(k) for k in (*keys, SEED)}
        rows += rows_of([replace(r, settings={**own, **r.settings}) for r in some], chosen, run=run, config=config)
    if reference and not any(all(identity(row.settings[k]) == identity(v) for k, v in reference.items()) for row in rows):
        raise InputError(f"--reference: no member has {_words(reference)}.")
    marked = mark_best(rows, chosen, reference)
    notes = footnotes([MemberResult(r.run, r.settings, 0, "finished", {}) for r in marked], marked)
    tables = [_table(marked, chosen, None, notes + _unlike(configs, keys), reference)]
    if best := tuned_rows(rows, chosen, reference):
        tables.append(_table(best, chosen, "each at its best learning rate", rate_notes(best, rows), reference))
    return tables


def read_config(path: Path) -> dict[str, Any]:
    """The config of a run directory, as plain values; `InputError` where it is damaged."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path / 'config.yaml'}: cannot be read ({error})") from None
    return config if isinstance(config, dict) else {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys.

    >>> flat({"adapter": {"rank": 4}, "name": "a"})
    {'adapter.rank': 4, 'name': 'a'}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _unlike(configs: dict[Path, dict[str, Any]], swept: Sequence[str]) -> list[str]:
    """A note on what else differs between the runs: a comparison across unlike tasks or lengths is not one of the swept keys."""
    first, *others = [flat(config) for config in configs.values()]
    ignored = ("name", "sweep", "tracking")
    # A key that one config lacks is another method's or task's, or newer than the run.
    found = {key for other in others for key in differences(first, other) if key in first and key in other}
    found = {key for key in found if key.split(".")[0] not in ignored and key not in swept}
    shown = sorted(found)[:8]
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return [f"The runs' configs also differ in: {', '.join(shown)}{more}."] if shown else []


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """Swept key -> column heading, in words."""
    return {key: name.replace("_", " ") for key, name in short_names(union(row.settings for row in rows)).items()}


def estimate_text(estimate: Estimate, metric: Evaluator, *, signed: bool = False) -> str:
    """`87.3`, or over several seeds `87.3 ± 0.4`; the unit is in the heading."""
    mean = metric.format(estimate.mean, signed=signed)
    return mean if estimate.half_width is None else f"{mean} ± {metric.format(estimate.half_width)}"


def best_step_text(row: Row) -> str:
    steps = [m.best_step for m in row.members if m.best_step is not None]
    return "" if not steps else f"{steps[0]}" if len(set(steps)) == 1 else f"{min(steps)}-{max(steps)}"


def best_heading(rows: Sequence[Row], metric: Evaluator) -> str:
    """`best accuracy (%)`, or `loss at best accuracy`: `best` are the figures of the step that was best in the run's own metric."""
    chosen_by = {m.metric for row in rows for m in row.members} - {"", metric.name}
    # Perplexity is e to the loss: where one is best the other is.
    of = f"validation {metric.heading}" if tested(rows) else metric.heading
    if not chosen_by or (metric.name in _SAME_STEP and chosen_by <= _SAME_STEP):
        return f"best {of}"
    return f"{of} at best {chosen_by.pop() if len(chosen_by) == 1 else 'step'}"


def final_heading(rows: Sequence[Row], metric: Evaluator) -> str:
    """`final accuracy (%)`; where there are test rows, the figure is said to be of the others."""
    return f"final {'validation ' if tested(rows) else ''}{metric.heading}"


_SAME_STEP = {"loss", "perplexity"}


def difference_heading(reference: Mapping[str, Any] | None) -> str:
    """`to best`, or `to rank=1`."""
    return f"to {_words(reference)}" if reference else "to best"


def difference_text(row: Row, metric: Evaluator) -> str:
    """The difference with its interval; a dash for what others are compared with."""
    return estimate_text(row.difference, metric, signed=True) if row.difference else "–" if row.is_reference else ""


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={short_value(settings[key])}" for key, name in short_names(settings).items())


def _table(
    rows: Sequence[Row], metric: Evaluator, title: str | None, notes: Sequence[str], reference: Mapping[str, Any] | None = None
) -> Table:
    has_run, has_seeds = any(row.run for row in rows), any(len(row.members) > 1 for row in rows)
    has_steps, has_difference = any(best_step_text(row) for row in rows), any(row.difference for row in rows)
    caption = "\n".join(["* best", *notes] if any(row.is_best for row in rows) else notes)
    # As `Text`, on any console: of a plain string rich would take `[INST]` for markup and `:a:` for an emoji.
    about = Text(title, style="table.title") if title else None
    table = Table(title=about, caption=Text(caption, style="dim") if caption else None, caption_justify="left", header_style="bold")
    if has_run:
        table.add_column("run")
    keys = columns(rows)
    if not keys and not has_run:
        table.add_column("member")
    for key, heading in keys.items():
        numeric = all(isinstance(row.settings.get(key), (int, float)) for row in rows)
        table.add_column(Text(heading), justify="right" if numeric else "left")
    if has_seeds:
        table.add_column("seeds", justify="right")
    for heading in ("parameters", final_heading(rows, metric), best_heading(rows, metric)):
        table.add_column(Text(heading), justify="right", no_wrap=heading == "parameters")
    if has_steps:
        table.add_column("at step", justify="right")
    if tested(rows):
        table.add_column(Text(f"test {metric.heading}"), justify="right")
    if has_difference:
        table.add_column(Text(difference_heading(reference)), justify="right")
    for row in rows:
        cells: list[str | Text] = [row.run] if has_run else []
        cells += [short_value(row.settings.get(key)) for key in keys] if keys or has_run else [row.members[0].name]
        cells += [str(len(row.members))] if has_seeds else []
        cells += [f"{row.parameters:,}", _final(row, metric), "" if row.final.count == 0 else estimate_text(row.best, metric)]
        cells += [best_step_text(row)] if has_steps else []
        cells += [estimate_text(row.test, metric) if row.test.count else ""] if tested(rows) else []
        cells += [difference_text(row, metric)] if has_difference else []
        table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells), style="bold green" if row.is_best else None)
    return table


def _final(row: Row, metric: Evaluator) -> Text:
    figure = "" if math.isnan(row.final.mean) else estimate_text(row.final, metric)
    if row.unfinished:
        return Text.assemble((row.unfinished, "dim" if row.was_stopped else "red"), f" {figure}" if figure else "")
    return Text(figure + (" *" if row.is_best else "  "))


def write_summary_csv(path: Path | str, results: Sequence[MemberResult], reference: Mapping[str, Any] | None = None) -> Path:
    """Writes a row for each setting of everything but the seed, in the order of `results`.

    Its columns: every swept key; `parameters`; `seeds`, of which so many `finished`; for each final metric `M` its mean over them,
    `M_low` and `M_high` (the ends of the mean's 95 % interval by Student's t), `M_difference` to the reference (paired by seed, with
    `M_difference_low` and `M_difference_high`) and `difference_seeds`, how many could be paired; `best`, `reference`, and
    `best_learning_rate`: whether it is the best of all, what others are compared with, and the best of those that differ from it in the
    learning rate alone. What is not known is an empty cell: so are the intervals of a single seed.

    With test rows there are columns `test_M`, `test_M_low` and `test_M_high`, too, and the differences are `test_M_difference`.

    Args:
        path: The file.
        results: The members of one run.
        reference: As in `mark_best`; the best setting by default.
    """
    metric = primary_metric(results)
    rows = mark_best(rows_of(results, metric), metric, reference)
    tuned = {id(row.members) for row in best_rates(rows, metric)}
    names = union(r.final for r in results)
    if not reference:  # all metrics are compared with one row: the best in the primary one
        reference = next((row.settings for row in rows if row.is_best), None)
    metrics = {name: find_metric(name, results) for name in names}
    each = {name: mark_best(rows_of(results, m), m, reference) for name, m in metrics.items()}
    keys, with_test = union(row.settings for row in rows), tested(rows)
    table: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        out: dict[str, Any] = {key: row.settings.get(key) for key in keys}
        out |= {"parameters": row.parameters, "seeds": len(row.members), "finished": sum(m.status == "finished" for m in row.members)}
        for name in names:
            own = each[name][i]
            out |= _ends(name, own.final) | (_ends(f"test_{name}", own.test) if with_test else {})
            out |= _ends(f"{'test_' if with_test else ''}{name}_difference", own.difference)
        out["difference_seeds"] = row.difference.count if row.difference else None
        out |= {"best": row.is_best, "reference": row.is_reference, "best_learning_rate": id(row.members) in tuned}
        table.append({key: cell(value) for key, value in out.items()})
    return write_table(path, table, empty="parameters")


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    mean = None if estimate is None or math.isnan(estimate.mean) else estimate.mean
    half = None if estimate is None else estimate.half_width
    ends = {f"{name}_{end}": None if mean is None or half is None else mean + sign * half for end, sign in (("low", -1), ("high", 1))}
    return {name: mean, **ends}
