"""Where there are test rows, settings are chosen by validation figures, and test figures are what is told of them."""

from __future__ import annotations

from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from lora_jax.analysis import best_rates, mark_best, rates_table, results_table, rows_of, write_report, write_summary_csv
from lora_jax.analysis.compare import best_result, data_of
from lora_jax.tasks.evaluators import ACCURACY
from lora_jax.tracking import MemberResult

RANK, RATE, SEED = "adapter.rank", "optimizer.learning_rate", "training.seed"
# (rank, rate) -> final validation, best validation and test accuracy of seed 0; seed 1 has 0.02 more.
FIGURES = {(1, 0.1): (0.60, 0.80, 0.50), (1, 0.2): (0.70, 0.75, 0.90), (2, 0.1): (0.65, 0.70, 0.60), (2, 0.2): (0.50, 0.60, 0.95)}


def results(*, tested: str = "best") -> list[MemberResult]:
    return [
        MemberResult(
            f"rank={rank},learning_rate={rate},seed={seed}",
            {RANK: rank, RATE: rate, SEED: seed},
            100 * rank,
            "finished",
            {"accuracy": final + 0.02 * seed},
            {"accuracy": best + 0.02 * seed},
            best_step=3,
            test={"accuracy": test + 0.02 * seed} if tested else {},
            tested=tested,
            metric="accuracy",
        )
        for (rank, rate), (final, best, test) in FIGURES.items()
        for seed in (0, 1)
    ]


def chosen(some: list[MemberResult]) -> list[tuple[int, float]]:
    return [(row.settings[RANK], row.settings[RATE]) for row in best_rates(rows_of(some, ACCURACY), ACCURACY)]


def shown(table) -> str:
    out = StringIO()
    Console(file=out, width=250).print(table)
    return out.getvalue()


def test_rates_are_chosen_by_the_validation_figure_of_what_was_tested():
    assert chosen(results()) == [(1, 0.1), (2, 0.1)]  # by the best step, whose adapters were tested; the test would take 0.2
    assert chosen(results(tested="final")) == [(1, 0.2), (2, 0.1)]
    assert chosen(results(tested="")) == chosen(results(tested="final"))


def test_differences_are_of_test_figures():
    rows = mark_best(rows_of(results(), ACCURACY), ACCURACY)
    best = next(row for row in rows if row.is_best)
    assert (best.settings[RANK], best.settings[RATE]) == (1, 0.1) and best.test.mean == pytest.approx(0.51)
    assert [row.difference.mean for row in rows if row.difference] == pytest.approx([0.4, 0.1, 0.45])
    plain = mark_best(rows_of(results(tested=""), ACCURACY), ACCURACY)
    assert [row.difference.mean for row in plain if row.difference] == pytest.approx([-0.1, -0.05, -0.2])
    assert best_result(results())[1].startswith("best setting of 4 by mean validation accuracy (%): 81.0")


def test_every_table_says_which_part_its_figures_are_of(tmp_path):
    table, rates = shown(results_table(results())), shown(rates_table(results()))
    for text in (table, rates):
        assert "final validation accuracy (%)" in text and "best validation accuracy (%)" in text and "test accuracy (%)" in text
    assert "Test figures are of rows that nothing was chosen by" in " ".join(table.split())
    assert "the test rows had no part in it" in " ".join(rates.split())
    assert "validation" not in shown(results_table(results(tested=""))) + shown(rates_table(results(tested="")))
    page = write_report(tmp_path / "report.html", results(), name="r").read_text()
    assert "test accuracy (%) of the best by validation" in page and "final validation accuracy (%)" in page
    summary = pd.read_csv(write_summary_csv(tmp_path / "summary.csv", results())).set_index([RANK, RATE])
    assert summary.loc[(1, 0.1), "test_accuracy"] == pytest.approx(0.51) and summary.loc[(1, 0.1), "best"]
    assert summary.loc[(2, 0.1), "test_accuracy_difference"] == pytest.approx(0.1)
    plain = pd.read_csv(write_summary_csv(tmp_path / "plain.csv", results(tested="")))
    assert not [c for c in plain.columns if "test" in c] and "accuracy_difference" in plain.columns


def test_runs_of_before_the_test_keys_are_paired_with_newer_ones():
    assert data_of({"task.source": "a"}) == data_of({"task.source": "a", "task.test_source": None, "task.test_size": None})
    assert data_of({"task.source": "a"}) != data_of({"task.source": "a", "task.test_size": 5})
