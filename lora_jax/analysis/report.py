"""One self-contained HTML page about a run: heat map, table, settings, environment. It opens from disk, with no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..tasks.evaluators import Evaluator
from ..tracking.files import read_json, write_atomic
from ..tracking.panels import PICTURE
from ..tracking.progress import clock_time
from ..tracking.results import MemberResult, read_run
from ..tracking.rundir import member_folder
from ..tracking.state import read_state
from .compare import Row, footnotes, mark_best, rate_notes, rows_of, tested, tuned_rows
from .heatmap import heatmap_png
from .metrics import primary_metric, short_value
from .table import best_heading, best_step_text, columns, difference_heading, difference_text, estimate_text, final_heading, read_config

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1120px; margin: 2.2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.about { color: #656d76; margin: .15rem 0 0 }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.4rem 0 }
.figures div { border: 1px solid #d8dee4; border-radius: 6px; padding: .5rem .9rem; min-width: 6.5rem }
.figures b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums } .figures span { color: #656d76; font-size: .82rem }
img { max-width: 100%; height: auto; display: block; margin-left: -.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
table { font-size: .9rem }
th, td { padding: .3rem .62rem; text-align: left; border-bottom: 1px solid #d8dee4; white-space: nowrap }
th { font-weight: 600; border-bottom-width: 2px; white-space: normal; vertical-align: bottom }
.n { text-align: right } .best td { background: #dafbe1; font-weight: 600 }
.bad { color: #b3261e } .early { color: #656d76 } .notes { color: #656d76; font-size: .88rem; padding-left: 1.1rem }
pre { background: #f6f8fa; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45 }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; margin: 1.6rem 0 .6rem }
"""


def write_report(
    path: Path | str,
    results: Sequence[MemberResult],
    *,
    name: str,
    config_yaml: str = "",
    environment: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    metric: Evaluator | None = None,
    reference: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes the page.

    Args:
        path: The file, `report.html`.
        results: The members of one run.
        name: The run's name.
        config_yaml: The resolved config, shown as it is.
        environment: What `describe_environment` gave.
        summary: Figures of the whole run: `compiled_programs`, `seconds`, and `data`, what became of its rows; unknown ones are left out.
        metric: What to compare by; `primary_metric` by default.
        reference: Swept key -> value of what members are compared with, as in `mark_best`; the best setting by default.
        pictures: Member -> a PNG of a few examples with its answers; that of the best member is shown.

    Raises:
        InputError: The members have no metric in common.
    """
    metric = metric or primary_metric(results)
    rows = mark_best(rows_of(results, metric), metric, reference)
    about = _about(config_yaml)
    png = heatmap_png(results, metric=metric)  # the page itself says what run this is
    parts = [f"<h1>{escape(name)}</h1>", f'<p class="about">{escape(about)}</p>', _figures(results, rows, metric, summary or {})]
    if png is not None:
        # The picture has twice the pixels of a usual screen, so it is shown at half its size.
        width = int.from_bytes(png[16:20], "big") // 2
        source = base64.b64encode(png).decode()
        of = "validation " if tested(rows) else ""
        alt = f"Heat map of {of}{metric.name} over the swept settings; the table below has the same figures"
        parts.append(f'<img width="{width}" alt="{escape(alt)}" src="data:image/png;base64,{source}">')
    if tuned := tuned_rows(rows, metric, reference):
        parts += ["<h2>Each at its best learning rate</h2>", _table(tuned, metric, reference), _notes(rate_notes(tuned, rows))]
    parts += ["<h2>Members</h2>", _table(rows, metric, reference), _notes(footnotes(results, rows))]
    shown = [m.name for row in sorted(rows, key=lambda row: not row.is_best) for m in row.members if m.name in (pictures or {})]
    if pictures and shown:
        source = base64.b64encode(pictures[shown[0]]).decode()
        others = f" {PICTURE} in the folder of each other member shows its own." if len(shown) > 1 else ""
        about_picture = f"{shown[0]} at its last evaluation, on the first validation images.{others}"
        parts += ["<h2>Predictions</h2>", f'<p class="about">{escape(about_picture)}</p>']
        parts.append(f'<img alt="{escape(about_picture)}" src="data:image/png;base64,{source}">')
    if isinstance(data := (summary or {}).get("data"), list):
        parts += ["<h2>Data</h2>", _notes([str(line) for line in data])]
    if environment:
        parts += ["<h2>Environment</h2>", _environment(environment)]
    if config_yaml:
        parts.append(f"<details><summary>Settings</summary><pre>{escape(config_yaml)}</pre></details>")
    # The policy keeps the page from loading anything, whatever text ended up in it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(name)}</title><style>{_STYLE}</style>'
    )
    body = "\n".join(parts)
    return write_atomic(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


def report_run(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run directory from what is in it.

    Raises:
        InputError: It is not a run directory, no member has ended yet, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    results = read_run(run_dir)
    environment = read_json(run_dir / "environment.json") if (run_dir / "environment.json").exists() else {}
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = read_config(run_dir)
    files = {r.name: run_dir / member_folder(r.name) / PICTURE for r in results}
    return write_report(
        run_dir / "report.html",
        results,
        name=run_dir.resolve().name,
        config_yaml=text,
        environment=environment,
        summary=read_state(run_dir).summary,
        reference=(config.get("sweep") or {}).get("reference"),
        pictures={name: file.read_bytes() for name, file in files.items() if file.is_file()},
    )


def _about(config_yaml: str) -> str:
    """Base, task and length of training in one line."""
    try:
        config = yaml.safe_load(config_yaml) or {}
    except yaml.YAMLError as error:
        raise InputError(f"config.yaml: not YAML ({error})") from None
    sections = {key: value for key, value in config.items() if isinstance(value, dict)} if isinstance(config, dict) else {}
    model, task, training = (sections.get(key, {}) for key in ("model", "task", "training"))
    length = next((f"{training[key]:g} {key}" for key in ("steps", "epochs") if training.get(key)), "")
    if length and isinstance(more := training.get("extend_steps"), int) and more:
        length = f"{training['steps'] + more:g} steps" if training.get("steps") else f"{length} and {more:g} steps"
    tail = [str(part.get("source", "")).rstrip("/").split("/")[-1] for part in (model, task)]
    return ", ".join(text for text in (tail[0], str(task.get("kind", "")).replace("_", " "), tail[1], length) if text)


def _figures(results: Sequence[MemberResult], rows: Sequence[Row], metric: Evaluator, summary: Mapping[str, Any]) -> str:
    best = next((row for row in rows if row.is_best), None)
    figures = [(str(len(results)), "members")]
    if best is not None:
        if tested(rows):
            figures.insert(0, (estimate_text(best.test, metric), f"test {metric.heading} of the best by validation"))
        else:
            figures.insert(0, (estimate_text(best.final, metric), f"best final {metric.heading}"))
    for status, words in (("stopped", "stopped by halving"), ("diverged", "diverged"), ("failed", "failed")):
        if count := sum(r.status == status for r in results):
            figures.append((str(count), words))
    if isinstance(summary.get("compiled_programs"), int):
        figures.append((str(summary["compiled_programs"]), "compiled programs"))
    if isinstance(summary.get("seconds"), (int, float)):
        figures.append((clock_time(summary["seconds"]), "wall time"))
    paddings = [r.padding_share for r in results if not math.isnan(r.padding_share)]
    if paddings:
        figures.append((f"{100 * sum(paddings) / len(paddings):.1f} %", "padding"))
    return '<div class="figures">' + "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in figures) + "</div>"


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _table(rows: Sequence[Row], metric: Evaluator, reference: Mapping[str, Any] | None) -> str:
    keys = columns(rows)
    numeric = {key: all(isinstance(row.settings.get(key), (int, float)) for row in rows) for key in keys}
    head = [(h, numeric[k], k) for k, h in keys.items()] if keys else [("member", False, "")]
    with_test = tested(rows)
    with_train = any(row.train.count for row in rows)
    figures = [
        "seeds",
        "parameters",
        *([f"training {metric.heading}"] if with_train else []),
        final_heading(rows, metric),
        best_heading(rows, metric),
        "at step",
    ]
    figures += [*([f"test {metric.heading}"] if with_test else []), difference_heading(reference)]
    figures += ["tokens/s", "padding (%)"]
    lines = ["<tr>" + "".join(_cell("th", h, n, k) for h, n, k in head) + "".join(_cell("th", f, True) for f in figures) + "</tr>"]
    for row in rows:
        cells = [_cell("td", short_value(row.settings.get(k)), numeric[k], str(row.settings.get(k))) for k in keys]
        cells = cells or [_cell("td", row.members[0].name, False)]
        known = not math.isnan(row.final.mean)
        final = escape(estimate_text(row.final, metric)) if known else ""
        bad = f'<span class="{"early" if row.was_stopped else "bad"}">{escape(row.unfinished)}</span> ' if row.unfinished else ""
        speed, padding = (sum(getattr(m, k) for m in row.members) / len(row.members) for k in ("tokens_per_second", "padding_share"))
        cells += [_cell("td", str(len(row.members)), True), _cell("td", f"{row.parameters:,}", True)]
        cells += [_cell("td", estimate_text(row.train, metric) if row.train.count else "", True)] if with_train else []
        cells += [f'<td class="n">{bad}{final}</td>']
        cells += [_cell("td", estimate_text(row.best, metric) if known else "", True), _cell("td", best_step_text(row), True)]
        cells += [_cell("td", estimate_text(row.test, metric) if row.test.count else "", True)] if with_test else []
        cells += [_cell("td", difference_text(row, metric), True)]
        cells += [_cell("td", "" if math.isnan(speed) else f"{speed:,.0f}", True)]
        cells += [_cell("td", "" if math.isnan(padding) else f"{100 * padding:.1f}", True)]
        lines.append(('<tr class="best">' if row.is_best else "<tr>") + "".join(cells) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _cell(tag: str, text: str, number: bool, hover: str = "") -> str:
    title = f' title="{escape(hover)}"' if hover and hover != text else ""
    return f"<{tag}{' class=n' if number else ''}{title}>{escape(text)}</{tag}>"


def _environment(environment: Mapping[str, Any]) -> str:
    """Name and value of each entry; nested ones on one line, and only the number of times it was resumed."""
    lines = []
    for key, value in environment.items():
        if key == "resumed":
            text = f"{len(value)} times, last at {value[-1].get('time', '?')}" if value else ""
        elif isinstance(value, Mapping):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f'<tr><th>{escape(str(key))}</th><td style="white-space:normal">{escape(text)}</td></tr>')
    return "<table>" + "".join(lines) + "</table>"
