import io
import math

import pytest
from rich.console import Console

from lora_jax.analysis import compare_runs, results_table
from lora_jax.config.errors import InputError
from lora_jax.tracking import MemberResult


def text(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def row(table, *words):
    (line,) = [line for line in text(table).splitlines() if all(word in line for word in words) and "│" in line]
    return line


def member(rank, value, metric="accuracy", status="finished", **settings):
    settings = {"adapter.rank": rank} | settings
    return MemberResult(str(settings), settings, 1000 * rank, status, {metric: value}, {metric: value}, best_step=7)


def write_run(folder, config, results):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    for index, result in enumerate(results):
        result.write(folder / str(index))
    return folder


def test_best_is_marked_and_diverged_is_said():
    table = results_table([member(4, 0.81), member(8, 0.9), member(16, math.nan, status="diverged")], title="reviews")
    assert "rank" in text(table) and "reviews" in text(table)
    assert "90.0 *" in row(table, "8,000") and "81.0" in row(table, "4,000") and "-9.0" in row(table, "4,000")
    assert "diverged" in row(table, "16,000") and "nan" not in text(table) and "*" not in row(table, "16,000")


def test_perplexity_is_better_when_lower():
    table = results_table([member(4, 12.5, "perplexity"), member(8, 14.0, "perplexity")])
    assert "12.50 *" in row(table, "4,000") and "+1.50" in row(table, "8,000")


def test_a_run_without_a_sweep_has_its_row():
    assert "only" in row(results_table([MemberResult("only", {}, 1234, "finished", {"accuracy": 0.5})]), "1,234")


def test_seeds_share_a_row():
    results = [member(4, value, **{"training.seed": seed}) for seed, value in enumerate((0.8, 0.82, 0.84))]
    assert "82.0 ± 5.0" in row(results_table(results), "4,000")


def test_runs_beside_each_other_fill_in_what_they_did_not_sweep(tmp_path):
    config = "name: {0}\nmodel: {{source: {1}}}\nadapter: {{rank: 8}}\noptimizer: {{learning_rate: 0.002}}\n"
    one = write_run(tmp_path / "one", config.format("one", "m1"), [member(4, 0.8), member(8, 0.9)])
    swept = MemberResult("b", {"optimizer.learning_rate": 0.05}, 77, "finished", {"accuracy": 0.95})
    two = write_run(tmp_path / "two", config.format("two", "m2"), [swept])
    table = compare_runs([one, two])
    assert "2e-3" in row(table, "one", "4,000") and "0.05" in row(table, "two") and " 8 " in row(table, "two") and "*" in row(table, "two")
    assert "also differ in: model.source" in text(table) and "name" not in text(table)


def test_runs_need_something_to_compare_by(tmp_path):
    one = write_run(tmp_path / "one", "name: one\n", [member(4, 0.8)])
    two = write_run(tmp_path / "two", "name: two\n", [member(4, 9.0, "perplexity")])
    with pytest.raises(InputError, match="in common"):
        compare_runs([one, two])
    with pytest.raises(InputError, match="no such run"):
        compare_runs([one, tmp_path / "three"])
