"""summary.csv, against pandas and SciPy on the members' own figures."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lora_jax.analysis import write_summary_csv
from lora_jax.tracking import MemberResult

RANK, RATE, SEED = "adapter.rank", "optimizer.learning_rate", "training.seed"


def members(seeds=4):
    rng = np.random.default_rng(0)
    found = []
    for rank in (1, 8):
        for rate in (1e-3, 1e-2):
            for seed in range(seeds):
                accuracy = 0.5 + rank / 50 + (0.1 if (rank, rate) in ((1, 1e-3), (8, 1e-2)) else 0) + 0.01 * rng.standard_normal()
                settings = {RANK: rank, RATE: rate, SEED: seed}
                metrics = {"loss": float(1 - accuracy + 0.01 * rng.standard_normal()), "accuracy": float(accuracy)}
                found.append(MemberResult(str(settings), settings, 10 * rank, "finished", metrics))
    return found


@pytest.mark.parametrize("reference", [None, {RANK: 1}])
def test_figures_are_pandas_and_scipys(tmp_path, reference):
    results = members()
    table = pd.read_csv(write_summary_csv(tmp_path / "summary.csv", results, reference)).set_index([RANK, RATE])
    flat = pd.DataFrame([{**r.settings, **r.final} for r in results])
    best = (8, 1e-2)
    assert list(table.index[table.best]) == [best] and sorted(table.index[table.best_learning_rate]) == [(1, 1e-3), best]
    assert sorted(table.index[table.reference]) == ([best] if reference is None else [(1, 1e-3), (1, 1e-2)])
    for at, group in flat.groupby([RANK, RATE]):
        row = table.loc[at]
        other = flat[(flat[RANK] == (1 if reference else 8)) & (flat[RATE] == (at[1] if reference else 1e-2))]
        assert (row.seeds, row.finished, row.parameters) == (4, 4, 10 * at[0])
        for name in ("loss", "accuracy"):
            low, high = stats.t.interval(0.95, 3, loc=group[name].mean(), scale=stats.sem(group[name]))
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((group[name].mean(), low, high))
            if row.reference:
                assert pd.isna(row[f"{name}_difference"]) and pd.isna(row.difference_seeds)
                continue
            paired = stats.ttest_rel(group.sort_values(SEED)[name], other.sort_values(SEED)[name])
            low, high = paired.confidence_interval(0.95)
            assert (row[f"{name}_difference_low"], row[f"{name}_difference_high"]) == pytest.approx((low, high))
            assert row.difference_seeds == 4


def test_of_one_seed_there_is_no_interval(tmp_path):
    results = [r for r in members() if r.settings[SEED] == 0]
    table = pd.read_csv(write_summary_csv(tmp_path / "summary.csv", results))
    assert table.accuracy.notna().all() and table[["accuracy_low", "accuracy_high"]].isna().all(axis=None)
    assert table.accuracy_difference.notna().sum() == 3 and table.accuracy_difference_low.isna().all()


def test_a_seed_that_diverged_is_counted_and_left_out(tmp_path):
    results = members(3)
    bad = results[0]
    results[0] = MemberResult(bad.name, bad.settings, bad.parameters, "diverged", {"loss": float("nan"), "accuracy": 0.1})
    row = pd.read_csv(write_summary_csv(tmp_path / "summary.csv", results)).iloc[0]
    assert (row.seeds, row.finished, row.difference_seeds) == (3, 2, 2)
    assert row.accuracy == pytest.approx(np.mean([r.final["accuracy"] for r in results[1:3]]))
