import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from lora_jax.analysis import compare_runs, rates_table, results_table
from lora_jax.errors import InputError
from lora_jax.tracking import MemberResult


def text(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def said(table):
    return " ".join(text(table).split())


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
    (table,) = compare_runs([one, two])
    assert "2e-3" in row(table, "one", "4,000") and "0.05" in row(table, "two") and " 8 " in row(table, "two") and "*" in row(table, "two")
    assert "also differ in: model.source" in text(table) and "name" not in text(table)
    # Other bases have other tokens: nothing is paired, and the table says so.
    assert "-" not in row(table, "one", "4,000").replace("2e-3", "")
    assert "differ in model.source, because they cannot be paired" in said(table)


def test_runs_need_something_to_compare_by(tmp_path):
    one = write_run(tmp_path / "one", "name: one\n", [member(4, 0.8)])
    two = write_run(tmp_path / "two", "name: two\n", [member(4, 9.0, "perplexity")])
    with pytest.raises(InputError, match="in common"):
        compare_runs([one, two])
    with pytest.raises(InputError, match="no such run"):
        compare_runs([one, tmp_path / "three"])


def test_runs_at_different_learning_rates_say_so(tmp_path):
    config = "name: {0}\nadapter: {{rank: 8}}\noptimizer: {{learning_rate: {1}}}\n"
    one = write_run(tmp_path / "one", config.format("one", 0.004), [member(4, 0.8), member(8, 0.9)])
    two = write_run(tmp_path / "two", config.format("two", 0.002), [member(4, 0.7)])
    three = write_run(tmp_path / "three", config.format("three", 0.004), [member(2, 0.6)])
    first, *_ = compare_runs([one, two])
    assert "4e-3" in row(first, "one", "8,000") and "2e-3" in row(first, "two") and "single learning rate" not in said(first)
    first, *_ = compare_runs([one, three])
    assert "single learning rate" in said(first) and "4e-3" not in said(first)


RATE, SEED = "optimizer.learning_rate", "training.seed"
CONFIG = "name: x\ntask: {{source: a.csv}}\nadapter: {{rank: {0}}}\ntraining: {{steps: {1}, seed: {2}, eval_every: {1}}}\n"


def test_runs_are_paired_by_seed_where_data_and_steps_are_the_same(tmp_path):
    def run(name, rank, steps, values, first=0, swept=True):
        results = [
            MemberResult(f"{v}", {SEED: first + i} if swept else {}, 1000 * rank, "finished", {"accuracy": v}) for i, v in enumerate(values)
        ]
        return write_run(tmp_path / name, CONFIG.format(rank, steps, first), results)

    low = run("low", 1, 50, [0.50, 0.60, 0.90])
    high = run("high", 2, 50, [0.52, 0.62, 0.92])
    (table,) = compare_runs([low, high])
    assert "-2.0 ± 0.0" in row(table, "low") and "–" in row(table, "high") and "cannot be paired" not in text(table)
    # One seed, from the config; of it there is no interval.
    (table,) = compare_runs([run("other", 4, 50, [0.7], first=1, swept=False), high])
    assert "-8.0 │" in row(table, "high")
    (table,) = compare_runs([run("longer", 1, 100, [0.5, 0.6, 0.7]), high])
    assert "-" not in row(table, "longer") and "differ in training.steps, because they cannot be paired" in said(table)
    (table,) = compare_runs([run("seeds", 1, 50, [0.5, 0.6], first=7), high])
    assert "-" not in row(table, "seeds") and "no seed in common" in said(table)


def test_runs_are_compared_with_a_reference(tmp_path):
    runs = []
    for rank in (1, 2, 3):
        result = MemberResult("m", {}, 1000 * rank, "finished", {"accuracy": rank / 100})
        runs.append(write_run(tmp_path / f"r{rank}", CONFIG.format(rank, 50, 0), [result]))
    (table,) = compare_runs(runs, reference={"adapter.rank": 1})
    assert "to rank=1" in text(table) and "–" in row(table, "r1") and "+2.0" in row(table, "r3")
    with pytest.raises(InputError, match="no member has rank=9"):
        compare_runs(runs, reference={"adapter.rank": 9})


def test_each_at_its_best_learning_rate():
    values = {(1, 1e-3): (0.7, 0.8), (1, 1e-2): (0.6, 0.6), (8, 1e-3): (0.6, 0.7), (8, 1e-2): (0.8, 0.9)}
    results = [member(rank, v, **{RATE: rate, SEED: seed}) for (rank, rate), two in values.items() for seed, v in enumerate(two)]
    table = rates_table(results, reference={"adapter.rank": 1})
    assert "1e-3" in row(table, "1,000") and "75.0" in row(table, "1,000") and "0.01" in row(table, "8,000")
    assert "+10.0 ± 0.0" in row(table, "8,000") and "to rank=1" in text(table)
    assert "1 of 2 at the smallest swept (0.001) and 1 of 2 at the largest swept (0.01)" in said(table)
    assert rates_table(results[:2]) is None and rates_table([member(1, 0.5), member(2, 0.6)]) is None


BRACKETS = "[INST] {text} [/INST]"


def test_values_with_brackets_are_shown_as_they_are(tmp_path):
    results = [MemberResult(f"m{i}", {"task.template": v}, 10 + i, "finished", {"accuracy": 0.5 + i / 10}) for i, v in enumerate(_MARKED)]
    shown = text(results_table(results, title="[red]run[/x]"))
    for words in (*_MARKED[:3], "{text}\\n[/b]\\x1b[31m", "[red]run[/x]"):
        assert words in shown, words
    write_run(tmp_path / "[b]x[red]", "name: x\n", results)
    (table,) = compare_runs([tmp_path / "[b]x[red]"])
    assert "[b]x[red]" in text(table) and BRACKETS in text(table)


_MARKED = (BRACKETS, "layers[0-3].q[a-z]+", ":smile: {text}", "{text}\n[/b]\x1b[31m")


def test_the_name_of_a_run_without_a_sweep_keeps_its_brackets():
    assert "[a]b[/c]" in text(results_table([MemberResult("[a]b[/c]", {}, 1, "finished", {"accuracy": 0.5})]))


def test_members_stopped_by_halving_are_said_to_be_stopped():
    results = [
        member(2, 0.6, status="stopped"),
        replace(member(4, 0.7, status="stopped"), rung=2),
        replace(member(16, 0.7, status="stopped"), steps=12),
        member(8, 0.9),
    ]
    table = results_table(results)
    assert "stopped (rung 2)" in row(table, "4,000") and "stopped (step 12)" in row(table, "16,000")
    seeds = [replace(member(2, 0.6, **{SEED: i}), status=s, rung=r) for i, (s, r) in enumerate([("stopped", 1), ("finished", None)])]
    assert "1 of 2 stopped (rung 1)" in row(results_table(seeds), "2,000")


def test_the_best_column_says_whose_step_it_is():
    results = [replace(member(r, 0.5), metric="accuracy", final={"accuracy": r / 10, "loss": 1.0}, best={"loss": 2.0}) for r in (2, 4)]
    assert "loss at best accuracy" in text(results_table(results, "loss")) and "best loss" not in text(results_table(results, "loss"))
    assert "best accuracy (%)" in text(results_table(results))
    bare = [replace(r, metric="perplexity") for r in results]
    assert "best loss" in text(results_table(bare, "loss"))


def test_keys_of_another_method_are_no_difference(tmp_path):
    one = write_run(tmp_path / "one", "name: one\nadapter: {method: lora, rank: 8, alpha: 4}\n", [member(8, 0.5)])
    two = write_run(tmp_path / "two", "name: two\nadapter: {method: full, alpha: 2}\n", [member(8, 0.6)])
    (table,) = compare_runs([one, two])
    assert "also differ in: adapter.alpha, adapter.method." in said(table)
