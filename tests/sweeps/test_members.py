"""A grid's members: all combinations, named after what is their own."""

from pathlib import Path

import pytest

import lora_jax
from lora_jax.config.load import load_config
from lora_jax.config.yaml import dump
from lora_jax.errors import InputError
from lora_jax.sweeps import run
from lora_jax.sweeps.run import SweepOutcome
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import MemberResult
from tests.tiny import config


def grid(**keys):
    return config().model_copy(update={"sweep": config_sweep({k.replace("__", "."): v for k, v in keys.items()})})


def config_sweep(values):
    from lora_jax.config.schema import SweepConfig

    return SweepConfig(grid=values)


def test_without_a_sweep_there_is_one_member():
    (member,) = members_of(config())
    assert (member.name, member.settings, member.config) == ("main", {}, config())


def test_all_combinations_in_order():
    members = members_of(grid(adapter__rank=[2, 4], adapter__targets=["mlp", ["q_proj", "v_proj"]]))
    assert [m.name for m in members] == [
        "rank=2,targets=mlp",
        "rank=2,targets=q_proj+v_proj",
        "rank=4,targets=mlp",
        "rank=4,targets=q_proj+v_proj",
    ]
    assert members[1].settings == {"adapter.rank": 2, "adapter.targets": ["q_proj", "v_proj"]}
    assert members[1].config.adapter.targets == ["q_proj", "v_proj"] and members[1].config.adapter.rank == 2
    assert members[3].config.optimizer == config().optimizer


def test_keys_that_end_alike_keep_their_sections():
    assert [m.name for m in members_of(grid(model__source=["a"], task__source=["b"], training__seed=[3]))] == [
        "model.source=a,task.source=b,seed=3"
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e-3, "rank_pattern={}"),
        (None, "layers=None"),
        (True, "rslora=True"),
        ([0, 2], "layers=0+2"),
        ({"q_proj": 4}, 'rank_pattern={"q_proj": 4}'),
    ],
)
def test_values_in_names(value, name):
    key = "adapter." + name.partition("=")[0]
    if value == 1e-3:
        key, name = "optimizer.learning_rate", "learning_rate=0.001"
    assert members_of(grid(**{key.replace(".", "__"): [value]}))[0].name == name


def test_two_members_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"sweep: 'layers=1\+2' appears twice"):
        members_of(grid(adapter__layers=[[1, 2], "1+2"]))


def test_wrong_values_and_keys_are_refused():
    with pytest.raises(InputError, match=r"sweep: adapter\.rank: must be a whole number above 0, got 0"):
        members_of(grid(adapter__rank=[2, 0]))
    with pytest.raises(InputError, match=r"Did you mean 'adapter\.rank'"):
        members_of(grid(adapter__rnk=[2]))


SPACE = {"grid": {"adapter.alpha": [1.0]}, "seeds": 2, "max_pack": 3, "memory_limit": "1GB"}


@pytest.fixture
def called(monkeypatch):
    """The configs that `fit` and `sweep` would run."""
    seen = []

    def noted(config, **options):
        seen.append(config)
        return SweepOutcome(Path(), [MemberResult("main", {}, 1, "finished", {})], 0)

    monkeypatch.setattr(run, "run_sweep", noted)
    return seen


def test_python_replaces_the_grid_alone(called, tmp_path):
    """A path, a string, mappings and a `Config` alike; the rest of the sweep stays."""
    whole = config().model_dump() | {"name": "tiny", "sweep": SPACE}
    file = tmp_path / "a.yaml"
    file.write_text(dump(whole))
    for given in (file, str(file), whole, load_config(file)):
        lora_jax.sweep(given, {"adapter.rank": [2, 8]}, {"adapter.alpha": 3.0, "name": "other"})
        made = called.pop()
        assert made.sweep.grid == {"adapter.rank": [2, 8]} and made.name == "other" and made.adapter.alpha == 3.0
        assert (made.sweep.seeds, made.sweep.max_pack, made.sweep.memory_limit) == (2, 3, 10**9)
        lora_jax.fit(given, {"adapter.alpha": 3.0}, adapter__rank=4)
        made = called.pop()
        assert made.sweep is None and (made.adapter.rank, made.adapter.alpha) == (4, 3.0)
    assert lora_jax.sweep(config(), {"adapter.rank": [2]}) and called.pop().sweep.grid == {"adapter.rank": [2]}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda c: lora_jax.sweep(c, {"adapter.rank": 4}), r"sweep: 'adapter\.rank' has the value 4, not a list of values"),
        (lambda c: lora_jax.sweep(c, {"adapter.targets": "mlp"}), r"sweep: 'adapter\.targets' has the value 'mlp', not a list"),
        (lambda c: lora_jax.sweep(c, {"adapter.rank": [4]}, {"adapter.rank": 2}), r"'adapter\.rank' is set, and sweep\.grid"),
        (lambda c: lora_jax.sweep(c, {"adapter.rnk": [4]}), r"Did you mean 'adapter\.rank'"),
        (lambda c: lora_jax.fit(c, {"adapter.rnk": 4}), r"fit: .*adapter\.rnk"),
        (lambda c: lora_jax.fit(3), r"fit: the config is a int; give the path of a YAML file"),
    ],
)
def test_python_says_what_it_cannot_take(called, call, told):
    with pytest.raises(InputError, match=told):
        call(config())
    assert not called
