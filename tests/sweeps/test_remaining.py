"""A sweep that grew, or was interrupted, trains what is left and nothing twice."""

import json

import pytest

from lora_jax.errors import Stopped
from lora_jax.packing.planner import Planner
from lora_jax.packing.runner import PackRun
from lora_jax.parallel.processes import StopSignals
from lora_jax.sweeps.plan import plan_remaining
from lora_jax.sweeps.run import run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import RunDirectory
from lora_jax.training.setup import Preparer
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def packs_of(monkeypatch):
    """Notes the members of every pack that is trained."""
    seen, original = [], PackRun.train

    def noted(self, **options):
        seen.append([m.name for m in self.plan.members])
        return original(self, **options)

    monkeypatch.setattr(PackRun, "train", noted)
    return seen


def grid(**keys):
    return {
        "sweep": {"grid": {k.replace("__", "."): v for k, v in keys.items()}, "max_pack": 4},
        "training.steps": 3,
        "training.eval_every": 0,
    }


@pytest.mark.long  # tests/sweeps/test_exactly_once.py grows a sweep too
def test_more_ranks_and_seeds_train_the_new_members_alone(hub, tmp_path, monkeypatch):
    trained = packs_of(monkeypatch)
    first = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3])))
    times = {p: p.stat().st_mtime_ns for p in first.path.glob("*/final/adapter.json")}
    more = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3, 4])))
    assert trained == [["rank=2", "rank=3"], ["rank=4"]]
    assert [r.name for r in more.results] == ["rank=2", "rank=3", "rank=4"]
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    seeded = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3, 4], training__seed=[0, 1])))
    assert trained[2:] == [["rank=2,seed=1", "rank=3,seed=1", "rank=4,seed=1"]]
    assert [r.name for r in seeded.results] == [f"rank={r},seed={s}" for r in (2, 3, 4) for s in (0, 1)]
    assert not (more.path / "rank=2").exists() and (more.path / "rank=2,seed=0" / "final").is_dir()
    rows = (seeded.path / "results.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[1].startswith('"rank=2,seed=0",2,0,')
    fresh = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3, 4], training__seed=[0, 1]), name="fresh"))
    assert [r.final["loss"] for r in fresh.results] == pytest.approx([r.final["loss"] for r in seeded.results], rel=1e-5)


def test_another_setting_outside_the_sweep_is_another_run(hub, tmp_path):
    from lora_jax.errors import InputError

    run_sweep(hub.config(tmp_path, grid(adapter__rank=[2])))
    with pytest.raises(InputError, match=r"adapter\.alpha"):
        run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 4]) | {"adapter.alpha": 3.0}))


def test_a_pack_under_way_goes_on_as_it_was_when_the_sweep_grows(hub, tmp_path, monkeypatch):
    small = hub.config(tmp_path, grid(adapter__rank=[2, 3]))
    asked = StopSignals.asked
    monkeypatch.setattr(StopSignals, "asked", lambda self, step: step == 2)
    with pytest.raises(Stopped):
        run_sweep(small)
    monkeypatch.setattr(StopSignals, "asked", asked)
    trained = packs_of(monkeypatch)
    grown = hub.config(tmp_path, grid(adapter__rank=[2, 3, 4, 5]))
    run_sweep(grown)
    assert trained == [["rank=2", "rank=3"], ["rank=4", "rank=5"]]


def test_what_is_planned(hub, tmp_path):
    members = members_of(hub.config(tmp_path, grid(adapter__rank=[1, 2, 3, 4, 5])))
    prepare = Preparer()

    def plan(ended, started, largest=4):
        run = RunDirectory(tmp_path, statuses=dict.fromkeys(ended, "finished"))
        run.started_packs = lambda: [[f"rank={r}" for r in names] for names in started]
        return [[m.name[-1] for m in p.members] for p in plan_remaining(members, run, Planner(members[0].config, prepare, largest=largest))]

    assert plan([], []) == [["1", "2"], ["3", "4", "5"]]
    assert plan(["rank=1", "rank=4"], []) == [["2", "3", "5"]]
    assert plan(["rank=1"], [[1, 2]]) == [["1", "2"], ["3", "4", "5"]]
    assert plan(["rank=1", "rank=2"], [[1, 2]]) == [["3", "4", "5"]]
    assert plan([], [[1, 9]]) == [["1", "2"], ["3", "4", "5"]]  # 9 is no member any more
    assert plan([], [[1, 2]], largest=1) == [["1"], ["2"], ["3"], ["4"], ["5"]]  # --solo


def test_a_damaged_checkpoint_names_no_pack(hub, tmp_path):
    run = RunDirectory(tmp_path)
    folder = run.checkpoints(["a", "b"]) / "3"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps({"members": ["a", "b"]}))
    assert run.started_packs() == [["a", "b"]]
    for text in ("{", json.dumps({"members": ["a", "c"]}), json.dumps({})):
        (folder / "checkpoint.json").write_text(text)
        assert run.started_packs() == []
