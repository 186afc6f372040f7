"""A grid's members: all combinations, named after what is their own."""

import pytest

from lora_jax.errors import InputError
from lora_jax.sweeps.space import members_of
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
