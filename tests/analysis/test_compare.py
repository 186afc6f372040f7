import math

import numpy as np
import pytest
from scipy import stats

from lora_jax.analysis import Estimate, best_rates, find_metric, footnotes, mark_best, primary_metric, rates_table, rows_of
from lora_jax.analysis.compare import best_result, tuned_rows
from lora_jax.analysis.metrics import ordered_values, short_names, short_value
from lora_jax.errors import InputError
from lora_jax.tasks.evaluators import ACCURACY, LOSS
from lora_jax.tracking import MemberResult


def member(value, rank=4, seed=None, status="finished", metric="accuracy", **settings):
    settings |= {"adapter.rank": rank} | ({} if seed is None else {"training.seed": seed})
    return MemberResult(str(settings), settings, 10 * rank, status, {metric: value})


def test_interval_is_students_t():
    values = [0.8, 0.82, 0.87]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    estimate = Estimate.of(values)
    assert estimate.mean - estimate.half_width == pytest.approx(low) and estimate.mean + estimate.half_width == pytest.approx(high)
    assert Estimate.of([0.8]) == Estimate(0.8, None, 1)
    assert math.isnan(Estimate.of([]).mean)


def test_primary_metric_is_one_that_all_finished_members_have():
    both = MemberResult("b", {}, 1, "finished", {"loss": 1.0, "perplexity": math.e})
    assert primary_metric([both]).name == "perplexity" and not primary_metric([both]).larger_is_better
    assert primary_metric([both, member(1.0, metric="loss")]) == LOSS
    assert primary_metric([member(0.5), member(0, status="failed", metric="other")]) == ACCURACY
    with pytest.raises(InputError):
        primary_metric([member(0.5), member(1.0, metric="loss")])
    with pytest.raises(InputError, match="Did you mean 'accuracy'"):
        find_metric("acuracy", [member(0.5)])


@pytest.mark.parametrize("metric, best", [(ACCURACY, 8), (LOSS, 4)])
def test_best_follows_the_direction_of_the_metric(metric, best):
    rows = mark_best(rows_of([member(0.5, 4, metric=metric.name), member(0.7, 8, metric=metric.name)], metric), metric)
    assert [row.settings["adapter.rank"] for row in rows if row.is_best] == [best]


def test_the_best_member_is_the_median_of_the_best_setting():
    """Not the luckiest seed of a worse setting, whose 0.9 is the largest figure of all."""
    results = [member(v, 4, s) for s, v in enumerate((0.5, 0.6, 0.9))] + [member(v, 8, s) for s, v in enumerate((0.8, 0.7, 0.75))]
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY)
    best, why = best_result(results)
    assert best in next(row for row in rows if row.is_best).members and best.settings == {"adapter.rank": 8, "training.seed": 2}
    assert why == "best setting of 2 by mean accuracy (%): 75.0 over 3 seeds; its median member: 75.0"
    # An even number has the lower of the two in the middle; where no setting has finished, what did of one.
    assert best_result(results[3:5])[0].final["accuracy"] == 0.7
    assert best_result([member(0.5, 4, 0), member(math.nan, 4, 1, "diverged")])[0].final["accuracy"] == 0.5
    assert best_result([member(math.nan, 4)])[0].settings == {"adapter.rank": 4}


@pytest.mark.parametrize("order", [1, -1])
def test_of_equals_the_smallest_is_best_in_any_order(order):
    results = [member(0.7, 8), member(0.7, 4), member(0.6, 2)][::order]
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY)
    best, why = best_result(results)
    assert best.settings["adapter.rank"] == 4 == next(row for row in rows if row.is_best).settings["adapter.rank"]
    assert why.endswith("with the fewest parameters of 2 equal ones")
    assert any(note.startswith("2 settings are equally good") for note in footnotes(results, rows))


def test_seeds_are_averaged_and_differences_paired():
    # The seeds differ by far more than the ranks do; paired by seed, the difference is exact.
    results = [member(base + (0.02 if rank == 8 else 0), rank, seed) for rank in (4, 8) for seed, base in enumerate((0.5, 0.6, 0.9))]
    low, high = mark_best(rows_of(results, ACCURACY), ACCURACY)
    assert high.is_best and high.difference is None and len(low.members) == 3
    assert low.final.half_width > 0.2
    assert low.difference.mean == pytest.approx(-0.02) and low.difference.half_width == pytest.approx(0, abs=1e-9)


def test_who_did_not_finish_cannot_be_best():
    results = [member(0.99, 4, 0), member(math.nan, 4, 1, "diverged"), member(0.7, 8, 0), member(0.7, 8, 1)]
    broken, whole = mark_best(rows_of(results, ACCURACY), ACCURACY)
    assert whole.is_best and not broken.is_best and broken.unfinished == "1 of 2 diverged"
    assert any("cannot be best" in note for note in footnotes(results, [broken, whole]))
    assert not any(row.is_best for row in mark_best(rows_of([results[1]], ACCURACY), ACCURACY))


def test_notes_warn_of_one_learning_rate_and_one_seed():
    one = [member(0.5, 4), member(0.6, 8)]
    notes = " ".join(footnotes(one, rows_of(one, ACCURACY)))
    assert "single learning rate" in notes and "One seed" in notes and "no interval" in notes
    two = [member(v, r, s, **{"optimizer.learning_rate": lr}) for v, r, s, lr in [(0.5, 4, 0, 1e-4), (0.6, 4, 1, 1e-4), (0.6, 4, 0, 1e-3)]]
    notes = " ".join(footnotes(two, rows_of(two, ACCURACY)))
    assert "single learning rate" not in notes and "95 %" in notes


def test_names_and_values_are_short_but_tell_apart():
    assert short_names(["adapter.rank", "optimizer.learning_rate"]) == {"adapter.rank": "rank", "optimizer.learning_rate": "learning_rate"}
    assert short_names(["model.source", "task.source"]) == {"model.source": "model.source", "task.source": "task.source"}
    shown = [short_value(v) for v in (["q_proj", "v_proj"], ["query"], 0.00025, 1e-3, 0.5, 16, True, "x" * 99)]
    assert shown == ["q+v", "query", "2.5e-4", "1e-3", "0.5", "16", "yes", "x" * 27 + "…"]


def test_values_are_ordered_by_size():
    results = [member(0, rank) for rank in (16, 4, 128)]
    assert ordered_values("adapter.rank", results) == [4, 16, 128]
    targets = [MemberResult(t, {"t": t}, n, "finished", {}) for t, n in (("all-linear", 300), ("attention", 100), ("mlp", 200))]
    assert ordered_values("t", targets) == ["attention", "mlp", "all-linear"]


RATE = "optimizer.learning_rate"


def test_a_paired_difference_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 6), rng.normal(0.6, 0.1, 6)
    results = [member(v, rank, seed) for rank, values in ((4, a), (8, b)) for seed, v in enumerate(values)]
    low, high = mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 4})
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert low.difference is None and low.is_reference and not high.is_reference
    assert high.difference.mean == pytest.approx(np.mean(b - a)) and high.difference.count == 6
    assert high.difference.mean - high.difference.half_width == pytest.approx(interval.low)
    assert high.difference.mean + high.difference.half_width == pytest.approx(interval.high)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # 4,000 sweeps of 3 seeds with a known difference of 0.02: 95 % of the intervals hold it (3 standard errors: 1 %).
    rng = np.random.default_rng(1)
    noise, own = rng.normal(0, 0.1, (4000, 1, 3)), rng.normal(0, 0.01, (4000, 2, 3))
    held = 0
    for low, high in noise + own + np.array([[0.5], [0.52]]):
        results = [member(v, rank, seed) for rank, values in ((4, low), (8, high)) for seed, v in enumerate(values)]
        _, row = mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 4})
        held += abs(row.difference.mean - 0.02) <= row.difference.half_width
    assert held / 4000 == pytest.approx(0.95, abs=0.01)


def test_the_reference_is_the_row_that_is_else_the_same():
    results = [
        member(rank / 100 + (0.3 if t == "mlp" else 0), rank, **{"adapter.targets": t}) for t in ("mlp", "attention") for rank in (1, 2)
    ]
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 1})
    assert [row.is_reference for row in rows] == [True, False, True, False]
    assert [row.difference and row.difference.mean for row in rows] == [None, pytest.approx(0.01), None, pytest.approx(0.01)]
    assert [row.is_best for row in rows] == [False, True, False, False]
    # Nobody has it: no differences.
    assert not any(r.difference or r.is_reference for r in mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 3}))


def test_settings_compared_at_their_own_best_rates():
    values = {(1, 1e-3): 0.7, (1, 1e-2): 0.6, (8, 1e-3): 0.65, (8, 1e-2): 0.9, (16, 1e-3): 0.5}
    results = [member(v, rank, **{RATE: rate}) for (rank, rate), v in values.items()] + [
        member(math.nan, 16, None, "diverged", **{RATE: 1e-2})
    ]
    chosen = mark_best(best_rates(rows_of(results, ACCURACY), ACCURACY), ACCURACY, {"adapter.rank": 1})
    assert [(row.settings["adapter.rank"], row.settings[RATE]) for row in chosen] == [(1, 1e-3), (8, 1e-2), (16, 1e-3)]
    assert [row.difference and row.difference.mean for row in chosen] == [None, pytest.approx(0.2), pytest.approx(-0.2)]
    # Before the choice, each is compared at its own rate; a reference's rate may be said.
    every = mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 1})
    assert [row.difference and row.difference.mean for row in every][:4] == [None, None, pytest.approx(-0.05), pytest.approx(0.3)]
    fixed = mark_best(rows_of(results, ACCURACY), ACCURACY, {"adapter.rank": 1, RATE: 1e-3})
    assert [row.difference and row.difference.mean for row in fixed][1] == pytest.approx(-0.1)


def test_settings_with_one_rate_each_are_said_to_be_so_and_nothing_is_said_to_be_chosen():
    results = [member(v, rank, seed, **{RATE: rate}) for rank, rate, v in ((1, 1e-3, 0.6), (8, 1e-2, 0.7)) for seed in (0, 1)]
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY)
    assert rates_table(results) is None and not tuned_rows(rows, ACCURACY)
    assert any("a learning rate of its own, and no other" in note for note in footnotes(results, rows))
    results += [member(0.65, 1, seed, **{RATE: 1e-2}) for seed in (0, 1)]  # now one of them is chosen
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY)
    assert [(row.settings["adapter.rank"], row.settings[RATE]) for row in tuned_rows(rows, ACCURACY)] == [(1, 1e-2), (8, 1e-2)]
    assert rates_table(results) is not None and not any("of its own" in note for note in footnotes(results, rows))


def test_members_of_other_lengths_are_not_paired():
    results = [member(v, 4, seed, **{"training.steps": steps}) for steps, v in ((50, 0.5), (100, 0.6)) for seed in (0, 1)]
    rows = mark_best(rows_of(results, ACCURACY), ACCURACY)
    assert [row.difference for row in rows] == [None, None]
    assert any("differ in training.steps, because they cannot be paired" in note for note in footnotes(results, rows))
