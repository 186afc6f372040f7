"""Points of a sweep: products, rows, draws, single ones, seeds, and what a condition lets through."""

import math

import pytest

from lora_jax.config.load import load_config
from lora_jax.config.schema import SweepConfig
from lora_jax.errors import InputError
from lora_jax.sweeps.space import members_of, points
from tests.tiny import config


def swept(**values):
    return config().model_copy(update={"sweep": SweepConfig.model_validate(values)})


def drawn(count=200, seed=0, **keys):
    return list(points(swept(random={"count": count, "seed": seed, "keys": {k.replace("__", "."): v for k, v in keys.items()}})))


def test_grid_times_zip_times_seeds():
    sweep = swept(
        grid={"adapter.rank": [2, 4]}, zip={"adapter.targets": ["attention", "mlp"], "optimizer.learning_rate": [1e-3, 2e-3]}, seeds=2
    )
    members = members_of(sweep)
    assert len(members) == 8
    assert members[0].name == "rank=2,targets=attention,learning_rate=0.001,seed=0"
    assert members[3].settings == {"adapter.rank": 2, "adapter.targets": "mlp", "optimizer.learning_rate": 2e-3, "training.seed": 1}
    assert members[3].config.training.seed == 1 and members[3].config.optimizer.learning_rate == 2e-3


def test_seeds_alone_and_listed():
    assert [m.name for m in members_of(swept(seeds=3))] == ["seed=0", "seed=1", "seed=2"]
    assert [m.config.training.seed for m in members_of(swept(seeds=[7, 5]))] == [7, 5]


def test_single_members_stand_beside_the_rest():
    sweep = swept(grid={"adapter.rank": [2]}, members=[{"adapter.method": "full"}, {"adapter.rank": 9, "adapter.alpha": 1.0}])
    assert [m.name for m in members_of(sweep)] == ["rank=2", "method=full", "rank=9,alpha=1.0"]


def test_draws_lie_where_they_should_and_fill_it():
    rates = [p["optimizer.learning_rate"] for p in drawn(400, optimizer__learning_rate={"log_uniform": [1e-5, 1e-1]})]
    assert all(1e-5 <= r <= 1e-1 for r in rates) and all(r == float(f"{r:.4g}") for r in rates)
    thirds = [sum(low <= math.log10(r) < low + 4 / 3 for r in rates) for low in (-5, -5 + 4 / 3, -5 + 8 / 3)]
    assert all(abs(n - 133) < 40 for n in thirds)
    ranks = [p["adapter.rank"] for p in drawn(100, adapter__rank={"uniform": [1, 4]}, optimizer__b1={"uniform": [0.0, 0.9]})]
    assert set(ranks) == {1, 2, 3, 4} and all(type(r) is int for r in ranks)
    wide = [p["adapter.rank"] for p in drawn(300, adapter__rank={"log_uniform": [1, 64]}, optimizer__b1={"uniform": [0.0, 0.9]})]
    assert min(wide) == 1 and 55 < max(wide) <= 64 and 50 < sum(r < 4 for r in wide) < 150
    targets = [
        p["adapter.targets"] for p in drawn(60, adapter__targets={"choice": ["mlp", ["q_proj"]]}, optimizer__b1={"uniform": [0, 0.9]})
    ]
    assert 15 < targets.count("mlp") < 45 and ["q_proj"] in targets


def test_draws_are_seeded_and_more_of_them_keep_the_first():
    space = {"optimizer__learning_rate": {"log_uniform": [1e-5, 1e-1]}}
    few = drawn(10, **space)
    assert drawn(10, **space) == few and drawn(20, **space)[:10] == few
    assert drawn(10, seed=1, **space) != few
    more = drawn(10, **space, adapter__alpha={"uniform": [1, 32]})
    assert [p["optimizer.learning_rate"] for p in more] == [p["optimizer.learning_rate"] for p in few]


def test_equal_draws_are_one_member():
    assert len(drawn(50, adapter__rank={"choice": [1, 2, 4]})) == 3


def test_where_sees_swept_and_other_keys():
    sweep = swept(
        grid={"adapter.rank": [2, 4, 8], "adapter.targets": ["attention", "mlp"]}, where="rank < 8 or targets == 'mlp' and steps == 20"
    )
    assert [m.name for m in members_of(sweep)] == [
        "rank=2,targets=attention", "rank=2,targets=mlp", "rank=4,targets=attention", "rank=4,targets=mlp", "rank=8,targets=mlp",
    ]  # fmt: skip
    with pytest.raises(InputError, match="holds for no member"):
        members_of(swept(grid={"adapter.rank": [2]}, where="rank > 2"))


def test_too_many_members_are_asked_about():
    many = swept(grid={"training.seed": list(range(101)), "adapter.rank": list(range(1, 101))})
    with pytest.raises(InputError, match=r"more than 10,000 members.*--yes"):
        members_of(many)
    assert sum(1 for _ in points(many)) == 10_100
    assert len(members_of(many.model_copy(update={"sweep": many.sweep.model_copy(update={"where": "rank == 1"})}))) == 101


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ("sweep: {}", "has no key to sweep over"),
        ("sweep: {zip: {adapter.rank: [1, 2], adapter.alpha: [1.0]}}", "adapter.rank: 2, adapter.alpha: 1"),
        ("sweep: {grid: {adapter.rank: [1]}, zip: {adapter.rank: [2]}}", "swept in two ways"),
        ("sweep: {grid: {training.seed: [1]}, seeds: 2}", "swept in two ways"),
        ("sweep: {zip: {adapter.rnk: [1]}}", "Did you mean 'adapter.rank'"),
        ("sweep: {members: [{adapter.rnk: 1}]}", "Did you mean 'adapter.rank'"),
        ("sweep: {members: [{mesh.data: 1}]}", "cannot be swept"),
        ("sweep: {random: {count: 2, keys: {adapter.rnk: {choice: [1]}}}}", "Did you mean 'adapter.rank'"),
        ("sweep: {random: {count: 2, keys: {adapter.rank: {uniform: [4, 1]}}}}", "must be below"),
        ("sweep: {random: {count: 2, keys: {adapter.rank: {uniform: [1, 4], choice: [1]}}}}", "exactly one of"),
        ("sweep: {random: {count: 0, keys: {adapter.rank: {choice: [1]}}}}", "above 0"),
        ("sweep: {random: {count: 2, keys: {adapter.rank: {log_uniform: [0.0, 4.0]}}}}", "above 0"),
        ("sweep: {grid: {adapter.rank: [1]}, where: 'rnk < 2'}", "Did you mean 'adapter.rank'"),
        ("sweep: {grid: {adapter.rank: [1]}, where: 'open(1)'}", "sweep.where: a call"),
        ("sweep: {grid: {adapter.rank: [1, 1]}}", "twice"),
        ("sweep: {grd: {adapter.rank: [1]}}", "grid"),
    ],
)
def test_bad_spaces_are_told_with_their_key(tmp_path, lines, word):
    file = tmp_path / "c.yaml"
    file.write_text(
        "name: x\nmodel: {source: m}\ntask: {kind: classification, source: d.csv, text: t, label: l}\ntraining: {steps: 1}\n" + lines + "\n"
    )
    with pytest.raises(InputError) as error:
        load_config(file)
    assert word in str(error.value) and "sweep" in str(error.value) and str(file) in str(error.value)


def test_a_reference_must_be_among_the_members():
    def with_reference(reference):
        return members_of(swept(grid={"adapter.rank": [2, 4]}, seeds=2, reference=reference))

    assert len(with_reference({"adapter.rank": 4})) == 4
    for reference, words in (
        ({"adapter.rank": 8}, "no member has rank=8"),
        ({"adapter.rnk": 4}, "'adapter.rnk' is not swept. Did you mean 'adapter.rank'"),
        ({"training.seed": 0}, "seeds are paired"),
    ):
        with pytest.raises(InputError, match=words):
            with_reference(reference)
