import math

import pytest
from scipy import stats

from lora_jax.analysis import Estimate, Metric, find_metric, footnotes, mark_best, primary_metric, rows_of
from lora_jax.analysis.metrics import ordered_values, short_names, short_value
from lora_jax.config.errors import InputError
from lora_jax.tracking import MemberResult

ACCURACY, LOSS = Metric("accuracy", True), Metric("loss", False)


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
    assert primary_metric([both]).name == "perplexity" and not primary_metric([both]).higher_is_better
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
    assert "single learning rate" in notes and "One seed" in notes
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
