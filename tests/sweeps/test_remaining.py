"""A sweep that grew, or was interrupted, trains what is left and nothing twice."""

import json
import shutil
import signal

import pytest

from lora_jax.config.load import dump_config
from lora_jax.errors import InputError, RunError, Stopped
from lora_jax.packing import runner
from lora_jax.packing.planner import Planner
from lora_jax.packing.runner import PackRun
from lora_jax.parallel.processes import StopSignals
from lora_jax.sweeps import restore
from lora_jax.sweeps.plan import join_run, plan_remaining
from lora_jax.sweeps.restore import run_members
from lora_jax.sweeps.run import failures_message, run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import MemberResult, Progress, RunDirectory, read_state
from lora_jax.training.setup import Preparer
from tests import tiny
from tests.tiny_hub import call

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
    # Who is there already keeps its name and its folder; its settings name the new key.
    assert [r.name for r in seeded.results] == [f"rank={r}{s}" for r in (2, 3, 4) for s in ("", ",seed=1")]
    assert [r.settings["training.seed"] for r in seeded.results] == [0, 1] * 3
    assert (more.path / "rank=2" / "final").is_dir() and not (more.path / "rank=2,seed=0").exists()
    rows = (seeded.path / "results.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[1].startswith("rank=2,2,0,")
    fresh = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3, 4], training__seed=[0, 1]), name="fresh"))
    assert [r.final["loss"] for r in fresh.results] == pytest.approx([r.final["loss"] for r in seeded.results], rel=1e-5)


def record(path, config, *, steps=3):
    """A run directory of the config whose members have all ended, without training them."""
    run = RunDirectory.open(path.parent, path.name, dump_config(config), devices=[])
    for number, member in enumerate(members_of(config)):
        MemberResult(member.name, member.settings, 1, "finished", {"accuracy": number / 10, "loss": 1.0}, steps=steps).write(
            run.member(member.name)
        )
    run.close()
    return run.path


@pytest.mark.parametrize("registered", [True, False], ids=["registered", "older"])
def test_a_smaller_sweep_joins_what_its_directory_holds(hub, tmp_path, registered, capsys):
    """As `lora_jax.sweep(config, {"adapter.rank": [2, 3]})` after the config's own, larger sweep; nothing is trained twice or lost."""
    large = hub.config(tmp_path, grid(adapter__rank=[2, 3], adapter__alpha=[8.0, 16.0]))
    path = record(tmp_path / "runs" / "tiny", large)
    if registered:
        run_sweep(large)
    folders = sorted(p.name for p in path.iterdir() if p.is_dir())
    small = run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 3])), progress=Progress())
    assert [r.name for r in small.results] == [f"rank={r},alpha={a}" for a in (16.0, 8.0) for r in (2, 3)]
    assert "2 of them are from an earlier sweep" in capsys.readouterr().err
    assert len((path / "results.csv").read_text().splitlines()) == 5
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == folders
    assert sorted(m.name for m in run_members(path)) == folders and small.unfinished == 0
    # As `train CONFIG sweep=null`: the member is of the sweep, and `main` is no other.
    alone = run_sweep(large.model_copy(update={"sweep": None}))
    assert alone.results[0].name == "rank=2,alpha=16.0" and len(alone.results) == 4
    assert sorted(m.name for m in run_members(path)) == folders
    assert {m.name: m.config.adapter.alpha for m in run_members(path)}["rank=2,alpha=8.0"] == 8.0


def test_one_short_name_for_two_members_is_told_apart(hub, tmp_path):
    """`source` is the model's in one sweep and the task's in the next."""
    first = hub.config(tmp_path, grid(model__source=[str(hub.bert)]))
    path = record(tmp_path / "runs" / "tiny", first)
    second = hub.config(tmp_path, grid(task__source=[str(hub.bert)]))
    joined = join_run(path, second, members_of(second))
    assert [m.name for m in joined.members] == [f"task.source={hub.bert}", f"source={hub.bert.name}"] and joined.kept == 1


def test_a_kill_before_results_csv_leaves_nothing_unwritten(hub, tmp_path, monkeypatch):
    """The last file of a run is `results.csv`; a run that lacks it, or its figures, gets them from the next call."""
    config = hub.config(tmp_path, grid(adapter__rank=[2, 3]))
    path = record(tmp_path / "runs" / "tiny", config)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_results", lambda self, results: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_sweep(config)
    assert read_state(path).summary == {"packs": 1, "seconds": 0.0} and not (path / "results.csv").exists()
    run_sweep(config)
    assert (path / "results.csv").is_file()


def full_disk(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")


def no_directory(*arguments, **_):
    raise PermissionError(13, "Permission denied", f"{arguments[0]}/{arguments[1]}")


def removed(self, *_, **__):
    shutil.rmtree(self.run.path)
    raise RuntimeError("NOT_FOUND")


@pytest.mark.parametrize(
    ("where", "failure", "told"),
    [
        ((runner, "train_pack"), full_disk, "no space left on the disk. What was saved before is intact"),
        ((RunDirectory, "open"), no_directory, "cannot be written (Permission denied). What was saved before is intact"),
        ((PackRun, "build"), removed, "the run directory was removed while the run wrote to it"),
    ],
)
def test_a_failing_disk_is_told_of(hub, tmp_path, monkeypatch, where, failure, told):
    config = hub.config(tmp_path, grid(adapter__rank=[2, 3]))
    monkeypatch.setattr(*where, failure)
    with pytest.raises(RunError) as refused:
        run_sweep(config)
    assert told in str(refused.value)


def test_a_failed_pack_leaves_no_signal_waiting(hub, tmp_path, monkeypatch):
    """What trains next may be loading, and is stopped at once; and a stop that C++ code made a failure of is one."""
    config, seen = hub.config(tmp_path, grid(adapter__rank=[2, 3])), []
    monkeypatch.setattr(runner, "train_pack", lambda *_, **__: 1 / 0)
    original = PackRun.train

    def train(self, **options):
        seen.append(self.signals)
        return original(self, **options)

    monkeypatch.setattr(PackRun, "train", train)
    assert {r.status for r in run_sweep(config).results} == {"failed"}
    assert not seen[0].training

    def swallowed(self, **options):
        self.signals.received = signal.SIGTERM
        raise RuntimeError("INTERNAL: a callback failed")

    monkeypatch.setattr(PackRun, "train", swallowed)
    with pytest.raises(Stopped) as stopped:
        run_sweep(config, fresh=True)
    assert stopped.value.signal == signal.SIGTERM


def test_what_failed_or_diverged_is_a_failure(tmp_path):
    def told(*statuses):
        return failures_message([MemberResult(f"m{i}", {}, 1, s, {}, error="E") for i, s in enumerate(statuses)])

    assert told("finished", "diverged") is None
    assert "member 'm0' diverged" in told("diverged") and "all 2 members diverged" in told("diverged", "diverged")
    assert "--retry" in told("failed", "failed") and "2 members failed" in told("failed", "failed")


def test_a_command_whose_members_all_failed_says_how_to_try_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train_pack", lambda *_, **__: 1 / 0)
    failed = call("sweep", hub.write(tmp_path, grid(adapter__rank=[2, 3])))
    assert failed.code == 1 and "--retry" in failed.err and "in common" not in failed.err


def test_who_raced_is_not_joined(hub, tmp_path):
    halving = {"halving": {"rungs": [1]}}
    raced = hub.config(tmp_path, grid(adapter__rank=[2, 3, 4]) | {"sweep": {"grid": {"adapter.rank": [2, 3, 4]}, **halving}})
    path = record(tmp_path / "runs" / "tiny", raced)
    before = (path / "config.yaml").read_bytes()
    fewer = hub.config(tmp_path, grid(adapter__rank=[2]) | {"sweep": {"grid": {"adapter.rank": [2]}, **halving}})
    with pytest.raises(InputError, match="members cannot change; this sweep differs in 'rank=3', 'rank=4'"):
        run_sweep(fewer)
    assert (path / "config.yaml").read_bytes() == before


def test_another_setting_outside_the_sweep_is_another_run(hub, tmp_path):
    run_sweep(hub.config(tmp_path, grid(adapter__rank=[2])))
    with pytest.raises(InputError, match=r"adapter\.alpha"):
        run_sweep(hub.config(tmp_path, grid(adapter__rank=[2, 4]) | {"adapter.alpha": 3.0}))


@pytest.mark.slow
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


@pytest.mark.slow
def test_all_members_are_evaluated_by_one_program(hub, tmp_path, monkeypatch):
    """Ranks and targets differ; the figures are those of training."""
    space = {"zip": {"adapter.rank": [2, 3, 5], "adapter.targets": [["q_proj"], ["v_proj", "down_proj"], ["q_proj"]]}}
    outcome = run_sweep(hub.config(tmp_path, {"training.steps": 3, "sweep": space}))
    counted, original = set(), restore.evaluate_pack
    monkeypatch.setattr(restore, "evaluate_pack", lambda pack, *rest: (counted.add(pack.programs), original(pack, *rest))[1])
    found = restore.evaluate_run(outcome.path, member=None, split="eval", progress=Progress(enabled=False))
    assert [programs.evaluate.traces.count for programs in counted] == [1]
    for result in outcome.results:
        assert found[result.name] == pytest.approx(result.best, rel=1e-5), result.name
