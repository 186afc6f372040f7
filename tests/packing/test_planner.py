"""The plan: as few packs as possible, and none that mixes what must be compiled apart."""

import pytest

from lora_jax.config.load import with_values
from lora_jax.errors import InputError
from lora_jax.packing.cost import PackShapes
from lora_jax.packing.pack import Member
from lora_jax.packing.planner import PackPlan, Part, Planner, alike, cut_evenly, keep_plan, planned
from lora_jax.sweeps.plan import plan_remaining
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import RunDirectory
from lora_jax.training.setup import Preparer, set_up
from tests.tiny import config, quick_compile

pytestmark = pytest.mark.usefixtures("compile_cache")


def members(*settings):
    return [Member(str(i), s, with_values(config(), s)) for i, s in enumerate(settings)]


def cut_by_config_alone(largest):
    """A planner for members that cost the same: nothing is loaded."""
    planner = Planner(config(), lambda config: pytest.fail("loaded"), largest=largest)
    planner._cut = lambda group, most: [PackPlan(tuple(group[i] for i in cut)) for cut in cut_evenly(len(group), most)]
    return planner


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
    assert alike(together) == [together]


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
    groups = alike(members({}, {key: value}, {"adapter.rank": 2}))
    assert [[m.name for m in group] for group in groups] == [["0", "2"], ["1"]]


@pytest.mark.parametrize(
    ("count", "largest", "sizes"), [(8, 8, [8]), (9, 8, [4, 5]), (10, 4, [3, 4, 3]), (17, 16, [8, 9]), (3, 1, [1, 1, 1])]
)
def test_large_groups_are_cut_evenly(count, largest, sizes):
    chosen = members(*({"training.seed": i} for i in range(count)))
    packs = cut_by_config_alone(largest).packs(chosen)
    assert sorted(len(p.members) for p in packs) == sorted(sizes)
    assert [m.name for p in packs for m in p.members] == [str(i) for i in range(count)]


def test_nothing_to_do_is_no_pack():
    assert cut_by_config_alone(4).packs([]) == []


def parts(chosen, count, largest):
    return [names(cut_by_config_alone(largest).part(chosen, Part(i + 1, count))) for i in range(count)]


def test_parts_are_whole_packs_where_there_are_enough():
    chosen = members(*({"adapter.rank": i + 1} for i in range(12)))
    assert parts(chosen, 3, 4) == [[p] for p in names(cut_by_config_alone(4).packs(chosen))]
    assert sorted(pack for part in parts(chosen, 2, 4) for pack in part) == sorted(names(cut_by_config_alone(4).packs(chosen)))


def test_packs_are_cut_where_there_are_not():
    chosen = members(*({"adapter.rank": i + 1} for i in range(7)))
    assert [[len(p) for p in part] for part in parts(chosen, 3, 16)] == [[3], [2], [2]]
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


@pytest.fixture(scope="module")
def quick():
    with quick_compile():
        yield


@pytest.mark.slow
def test_packs_are_as_large_as_memory_allows(hub, tmp_path, quick, monkeypatch):
    """What is planned fits, as far as compiled programs say, and one member more would not."""
    grid = {"sweep": {"grid": {"adapter.rank": [2, 3, 4], "training.seed": [0, 1, 2]}}}
    free = hub.config(tmp_path, grid)
    setup, chosen = set_up(free), members_of(free)
    shapes = PackShapes(setup, [m.config for m in chosen])
    line = shapes.memory_line(9)
    monkeypatch.setattr(PackShapes, "memory_line", lambda self, most: line)  # compiled once
    limit = line.at(5).total
    said = []

    def plan(size):
        limited = with_values(free, {"sweep.memory_limit": size})
        return Planner(limited, lambda config: setup, largest=16, say=said.append).packs(members_of(limited))

    assert names(plan("100GB")) == [[m.name for m in chosen]] and not said
    packs = plan(limit)
    assert [len(p.members) for p in packs] == [4, 5] or [len(p.members) for p in packs] == [5, 4]
    assert "at most 5 in a pack" in said[0]
    assert sorted(m.name for p in packs for m in p.members) == sorted(m.name for m in chosen)
    assert [len(p.members) for p in plan(1000)] == [1] * 9 and "even one exceeds it" in said[1]


def test_padding_decides_who_trains_together(hub, tmp_path):
    """Over many steps layers that only some adapt are not worth a common program; over few they are."""
    grid = {"sweep": {"grid": {"adapter.layers": ["last:1", None], "adapter.rank": [2, 64]}}, "training.steps": 20}
    config = hub.config(tmp_path, grid)
    assert [len(p.members) for p in Planner(config, Preparer(), largest=16).packs(members_of(config))] == [4]
    long = hub.config(tmp_path, grid | {"training.steps": 1_000_000})
    packs = Planner(long, Preparer(), largest=16).packs(members_of(long))
    assert names(packs) == [["layers=last:1,rank=2", "layers=last:1,rank=64"], ["layers=None,rank=2", "layers=None,rank=64"]]
    free = with_values(long, {"sweep.max_padding": 0.9})
    assert len(Planner(free, Preparer(), largest=16).packs(members_of(free))) == 1


def test_a_plan_is_kept(hub, tmp_path):
    """Whatever a planner would say now: planned members train with whom they were planned; new ones by themselves."""
    config = hub.config(tmp_path, {"sweep": {"grid": {"adapter.rank": [1, 2, 3, 4, 5]}}})
    chosen = members_of(config)
    run = RunDirectory(tmp_path)
    kept = keep_plan(run, [PackPlan((chosen[0], chosen[3])), PackPlan((chosen[1],))])
    assert names(kept) == [["rank=1", "rank=4"], ["rank=2"]]
    planner = Planner(config, Preparer(), largest=16)
    assert names(plan_remaining(chosen, run, planner)) == [["rank=1", "rank=4"], ["rank=2"], ["rank=3", "rank=5"]]
    run.statuses["rank=4"] = "finished"
    assert names(plan_remaining(chosen, run, planner)) == [["rank=1"], ["rank=2"], ["rank=3", "rank=5"]]
    assert names(plan_remaining(chosen, run, Planner(config, Preparer(), largest=1))) == [["rank=2"], ["rank=1"], ["rank=3"], ["rank=5"]]
    keep_plan(run, [PackPlan((chosen[2], chosen[4]))])
    assert planned(run.state()) == [["rank=1", "rank=4"], ["rank=2"], ["rank=3", "rank=5"]]
    keep_plan(run, [PackPlan((chosen[0],))], stage=1)
    assert planned(run.state(), 1) == [["rank=1"]] and len(planned(run.state())) == 3
