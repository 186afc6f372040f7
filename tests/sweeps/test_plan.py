"""The plan: as few packs as possible, and none that mixes what must be compiled apart."""

import pytest

from lora_jax.config.errors import InputError
from lora_jax.config.load import with_values
from lora_jax.sweeps.members import Member
from lora_jax.sweeps.plan import Part, plan_packs, plan_part
from tests.tiny import config


def members(*settings):
    return [Member(str(i), s, with_values(config(), s)) for i, s in enumerate(settings)]


def names(packs):
    return [[m.name for m in p.members] for p in packs]


def test_numbers_and_targets_share_one_pack():
    together = members(
        {},
        {"adapter.rank": 16},
        {"adapter.alpha": 2.0},
        {"adapter.targets": ["q_proj"]},
        {"adapter.exclude": ["q_proj"]},
        {"adapter.layers": "last:1"},
        {"adapter.rank_pattern": {"q_proj": 2}},
        {"adapter.rslora": True},
        {"adapter.dropout": 0.1},
        {"training.seed": 7},
        *({f"optimizer.{k}": v} for k, v in {"learning_rate": 0.5, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1}.items()),
        *({f"optimizer.{k}": v} for k, v in {"b1": 0.5, "b2": 0.5, "eps": 1e-3, "clip_norm": 1.0, "b_lr_ratio": 2.0}.items()),
    )
    assert names(plan_packs(together, largest=100)) == [[m.name for m in together]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.bias", "all"),
        ("adapter.method", "full"),
        ("adapter.modules_to_save", ["pooler"]),
        ("training.batch_size", 16),
        ("training.steps", 21),
        ("training.accumulate", 2),
        ("training.batching", "padded"),
        ("training.data_seed", 1),
        ("training.eval_every", 5),
        ("model.source", "elsewhere"),
        ("model.dtype", "bfloat16"),
        ("task.max_length", 64),
        ("task.split_seed", 1),
    ],
)
def test_what_is_compiled_or_loaded_apart_is_planned_apart(key, value):
    assert names(plan_packs(members({}, {key: value}, {"adapter.rank": 2}), largest=9)) == [["0", "2"], ["1"]]


@pytest.mark.parametrize(
    ("count", "largest", "sizes"), [(8, 8, [8]), (9, 8, [4, 5]), (10, 4, [3, 4, 3]), (17, 16, [8, 9]), (3, 1, [1, 1, 1])]
)
def test_large_groups_are_cut_evenly(count, largest, sizes):
    packs = plan_packs(members(*({"training.seed": i} for i in range(count))), largest=largest)
    assert sorted(len(p.members) for p in packs) == sorted(sizes)
    assert [m.name for p in packs for m in p.members] == [str(i) for i in range(count)]


def test_nothing_to_do_is_no_pack():
    assert plan_packs([], largest=4) == []


def parts(chosen, count, largest):
    return [names(plan_part(chosen, Part(i + 1, count), largest=largest)) for i in range(count)]


def test_parts_are_whole_packs_where_there_are_enough():
    chosen = members(*({"adapter.rank": i + 1} for i in range(12)))
    assert parts(chosen, 3, 4) == [[p] for p in names(plan_packs(chosen, largest=4))]
    assert sorted(pack for share in parts(chosen, 2, 4) for pack in share) == sorted(names(plan_packs(chosen, largest=4)))


def test_packs_are_cut_where_there_are_not():
    chosen = members(*({"adapter.rank": i + 1} for i in range(7)))
    assert [[len(p) for p in share] for share in parts(chosen, 3, 16)] == [[3], [2], [2]]
    assert parts(chosen[:2], 3, 16) == [[["0"]], [["1"]], []]  # one has nothing to do


def test_parts_are_of_nearly_equal_size_and_together_all():
    chosen = members(*({"training.batch_size": 8 * (1 + i % 2), "adapter.rank": i + 1} for i in range(13)))
    shares = parts(chosen, 4, 3)
    assert sorted(name for share in shares for pack in share for name in pack) == sorted(m.name for m in chosen)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 3


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"])
def test_what_is_no_part(text):
    with pytest.raises(InputError, match="--part: '"):
        Part.parse(text)


def test_a_part_reads_as_it_is_written():
    assert Part.parse("2/4") == Part(2, 4) and str(Part(2, 4)) == "2/4"
