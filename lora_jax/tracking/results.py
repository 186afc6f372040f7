"""What a member came to: `results.json` in its folder, and `results.csv` with a row a member beside them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InputError, hint, nearest
from .files import read_json, write_atomic, write_json

STATUSES = ("finished", "diverged", "failed", "stopped")


@dataclass(frozen=True)
class MemberResult:
    """The outcome of one member.

    Attributes:
        name: The member's name inside its run, such as `rank=4,targets=attention`.
        settings: Swept dotted config key -> this member's value; empty where nothing was swept.
        parameters: Number of trainable parameters.
        status: `finished`, `diverged` (a loss that is not finite), `failed`, or `stopped` (it lost in a rung of halving).
        final: Metric -> value at the last evaluation (`accuracy`, `loss`, `perplexity`, ...). Unknown values are NaN.
        best: Metric -> value at `best_step`, the evaluation that was best in the run's primary metric.
        best_step: Step of `best`.
        steps: Optimizer steps done.
        seconds: Wall time of training and evaluation. Members of a pack share it: it is the pack's.
        tokens: Real (not padding) tokens trained on.
        tokens_per_second: Real tokens over training time.
        padding_share: Share of the positions computed on that were padding, 0 to 1.
        history: Optional rows of scalars by step, each with a `step`.
        error: Why it failed; empty where it did not.
        metric: What its task is compared by, a key of `final`; empty in runs of older versions.
        rung: Which rung of halving stopped it, from 1; None where none did, and in runs of older versions.
        test: Metric -> value on the test rows, scored once, when the member ended; empty where there are none, or halving stopped it.
        tested: Which of its adapters that was, `best` or `final`; empty where `test` is.
        details: What belongs to the metrics and is no number of its own: the task's tables at `best_step` (`confusion`, with the right
            class down and the predicted one across, and `class_f1`) with the `classes` in order, and `signatures` (metric -> the library
            and options that it was computed with). Empty where the task has none of these, and in runs of older versions.
        train: Metric -> mean over the last training steps that were logged, as they were trained (with dropout, of altered images): how
            far it is from `final` tells of overfitting. Empty where nothing was logged, and in runs of older versions.
        test_batches: `targets`, and the sums of `loss` and of `right` predictions, of each batch of test rows: members with the same
            test rows have the same batches, so their differences can be paired by them.
    """

    name: str
    settings: dict[str, Any]
    parameters: int
    status: str
    final: dict[str, float]
    best: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    tokens_per_second: float = 0.0
    padding_share: float = 0.0
    history: list[dict[str, float]] | None = None
    error: str = ""
    metric: str = ""
    rung: int | None = None
    test: dict[str, float] = field(default_factory=dict)
    tested: str = ""
    test_batches: dict[str, list[float]] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")

    def write(self, folder: Path | str) -> Path:
        """Writes `results.json` into the member's `folder`, atomically; NaN becomes null. Without a test it has no keys of one."""
        facts = {name: value for name, value in asdict(self).items() if name not in _OF_TEST or self.tested}
        for name in ("details", "train"):
            if not facts[name]:
                del facts[name]
        return write_json(Path(folder) / "results.json", facts)

    @classmethod
    def read(cls, path: Path | str) -> MemberResult:
        """Reads a `results.json`, or the one in a member's folder; null metrics come back as NaN.

        Raises:
            InputError: The file is missing or damaged; the message names it and the key.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        value = read_json(path)
        known = {f.name for f in fields(cls)}
        if extra := sorted(value.keys() - known):
            raise InputError(f"{path}: unknown key '{extra[0]}'")
        for key, kind in _KINDS.items():
            if key not in value and key in _REQUIRED:
                raise InputError(f"{path}: damaged, has no '{key}'")
            if key in value and (not isinstance(value[key], kind) or isinstance(value[key], bool)):
                raise InputError(f"{path}: damaged, '{key}' is {value[key]!r}")
        if value["status"] not in STATUSES:
            raise InputError(f"{path}: damaged, 'status' is {value['status']!r} (one of: {', '.join(STATUSES)})")
        for key in ("final", "best", *({"test", "train"} & value.keys())):
            metrics = value.get(key, {})
            if any(v is not None and (isinstance(v, bool) or not isinstance(v, (int, float))) for v in metrics.values()):
                raise InputError(f"{path}: damaged, '{key}' holds a metric that is not a number")
            value[key] = {name: math.nan if v is None else float(v) for name, v in metrics.items()}
        for key in _FLOATS & value.keys():
            value[key] = math.nan if value[key] is None else float(value[key])
        return cls(**value)


_OF_TEST = {"test", "tested", "test_batches"}
_FLOATS = {"seconds", "tokens_per_second", "padding_share"}
_REQUIRED = {"name", "settings", "parameters", "status", "final"}
_KINDS: dict[str, Any] = {
    "name": str,
    "settings": dict,
    "parameters": int,
    "status": str,
    "final": dict,
    "best": dict,
    "best_step": (int, type(None)),
    "steps": int,
    "tokens": int,
    "history": (list, type(None)),
    "error": str,
    "metric": str,
    "rung": (int, type(None)),
    "test": dict,
    "tested": str,
    "test_batches": (dict, type(None)),
    "details": dict,
    "train": dict,
    **dict.fromkeys(sorted(_FLOATS), (int, float, type(None))),
}


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, in order of first appearance.

    >>> union([["rank"], ["rank", "seed"]])
    ['rank', 'seed']
    """
    return list(dict.fromkeys(name for some in names for name in some))


def write_results_csv(path: Path | str, results: Sequence[MemberResult]) -> Path:
    """Writes a row a member: name, every swept key (dotted), parameters, status, `final_*`, `best_*`, `train_*` metrics, steps, tokens.

    With test rows also `test_*` metrics, and `tested`: which adapter they are of, `best` or `final`.

    Nothing that differs between equal runs: times are in `results.json`.

    What a member lacks, and every NaN, is an empty cell; lists are written as JSON.
    """
    keys = union(r.settings for r in results)
    finals, bests, tests, trains = (union(getattr(r, part) for r in results) for part in ("final", "best", "test", "train"))
    rows: list[dict[str, Any]] = []
    for r in results:
        row: dict[str, Any] = {"name": r.name} | {k: r.settings.get(k) for k in keys} | {"parameters": r.parameters, "status": r.status}
        row |= {f"final_{m}": r.final.get(m) for m in finals} | {f"best_{m}": r.best.get(m) for m in bests}
        row |= {f"train_{m}": r.train.get(m) for m in trains}
        row |= {f"test_{m}": r.test.get(m) for m in tests} | ({"tested": r.tested} if tests else {})
        row |= {k: getattr(r, k) for k in ("best_step", "steps", "tokens", "padding_share")}
        rows.append({k: cell(v) for k, v in row.items()})
    return write_table(path, rows, empty="name")


def write_table(path: Path | str, rows: Sequence[dict[str, Any]], *, empty: str) -> Path:
    """Writes rows of equal keys as CSV, whole or not at all; without rows a header with the column `empty` alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [empty], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomic(path, text.getvalue())


def cell(value: Any) -> Any:
    """A value as a CSV file has it: empty for None and NaN, lists and mappings as JSON."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else value


def check_run(path: Path) -> None:
    """Every command that reads a run says the same of a path that is none.

    Raises:
        InputError: there is nothing, or nothing of a run.
    """
    if (path / "config.yaml").is_file():
        return
    if path.exists():
        raise InputError(f"{path}: not a run directory (it has no config.yaml).")
    try:
        runs = [p.name for p in path.parent.iterdir() if (p / "config.yaml").is_file()]
    except OSError:
        runs = []
    near = hint(str(path), [str(path.parent / name) for name in nearest(path.name, runs)])
    raise InputError(f"{path}: no such run directory. {near}".rstrip())


def read_run(run_dir: Path | str) -> list[MemberResult]:
    """The results of every member of a run directory, ordered by their settings (numbers by size, not by spelling).

    Members that have not ended yet have no `results.json` and are left out.

    Raises:
        InputError: Not a run directory, no member has ended yet, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    check_run(run_dir)
    results = [MemberResult.read(path) for path in sorted(run_dir.glob("*/results.json"))]
    if not results:
        raise InputError(f"{run_dir}: no member has results yet")
    keys = union(r.settings for r in results)
    return sorted(results, key=lambda r: [_order(r.settings.get(k)) for k in keys])


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, (int, float)):
        return (0, float(value), "")
    return (1, 0.0, json.dumps(value))
