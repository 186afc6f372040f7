"""Successive halving: who goes on, with which bits, and what it costs."""

from __future__ import annotations

import math
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.config.schema import HalvingConfig
from lora_jax.errors import InputError, Stopped
from lora_jax.parallel.processes import StopSignals
from lora_jax.sweeps import halving
from lora_jax.sweeps.halving import rung_steps, survivors
from lora_jax.sweeps.run import run_sweep
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

# Ranks, targets, layers, dropout and rates differ; the learning rates decide who wins. Moderate ones: large steps magnify the
# rounding in which a vmapped member differs from a solo one.
MEMBERS = {
    "adapter.rank": [2, 5, 3, 4, 2, 3],
    "adapter.targets": [["q_proj"], ["down_proj"], "attention", ["v_proj"], "all-linear", "mlp"],
    "optimizer.learning_rate": [2e-3, 1e-5, 3e-3, 2e-5, 1e-3, 1e-6],
}


def race(count=6, rungs=(2, 4)):
    """The first `count` members in a race over 8 steps."""
    return {
        "training.steps": 8,
        "training.eval_every": 0,
        "tracking.log_every": 3,
        "adapter.dropout": 0.1,
        "adapter.layers": "last:2",
        "sweep": {
            "zip": {key: values[:count] for key, values in MEMBERS.items()},
            "halving": {"factor": 2, "rungs": list(rungs), "metric": "loss"},
            "max_pack": 4,
        },
    }


SWEEP = race()


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def test_rungs():
    assert rung_steps(HalvingConfig(rungs=3), 80) == [10, 20, 40]
    assert rung_steps(HalvingConfig(rungs=2, factor=3), 90) == [10, 30]
    assert rung_steps(HalvingConfig(rungs=[5, 7]), 8) == [5, 7]
    for section, total in ((HalvingConfig(rungs=[5, 8]), 8), (HalvingConfig(rungs=5), 8)):
        with pytest.raises(InputError, match="must increase"):
            rung_steps(section, total)


def test_who_goes_on():
    assert survivors({"a": 1.0, "b": math.nan, "c": 3.0, "d": 2.0}, 2) == ["c", "d"]
    assert survivors({"a": math.nan, "b": math.nan, "c": 1.0}, 2) == ["a", "c"]
    assert survivors({"a": 1.0, "b": 1.0, "c": 1.0}, 3) == ["a"]
    assert survivors({"a": -math.inf, "b": math.nan}, 2) == ["a"]


def arrays_of(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return {n: np.asarray(a) for n, a in checkpointer.restore((folder / "arrays").resolve()).items()}


@pytest.mark.parametrize(
    ("count", "rungs"), [pytest.param(4, [2], marks=pytest.mark.slow), pytest.param(6, [2, 4], marks=pytest.mark.long)]
)
def test_losers_stop_and_survivors_equal_their_solo_runs(hub, tmp_path, count, rungs):
    raced = run_sweep(hub.config(tmp_path, race(count, rungs)))
    by_status = {s: [r for r in raced.results if r.status == s] for s in ("stopped", "finished")}
    assert len(by_status["finished"]) == 2 and {r.steps for r in by_status["finished"]} == {8}
    assert sorted(r.steps for r in by_status["stopped"]) == ([2, 2] if count == 4 else [2, 2, 2, 4])
    for result in by_status["finished"]:
        one = {"zip": {key: [result.settings[key]] for key in MEMBERS}}
        alone = run_sweep(hub.config(tmp_path, SWEEP | {"sweep": one}, name=f"alone{result.settings['adapter.rank']}"))
        (solo,) = alone.results
        assert result.final["loss"] == pytest.approx(solo.final["loss"], rel=1e-5)
        mine, theirs = (arrays_of(p / result.name / "final") for p in (raced.path, alone.path))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].shape == theirs[name].shape
            assert np.linalg.norm(mine[name] - theirs[name]) <= 1e-5 * np.linalg.norm(theirs[name]) + 1e-12, name


@pytest.mark.long
def test_a_race_that_was_stopped_again_and_again_ends_the_same(hub, tmp_path, monkeypatch):
    raced = run_sweep(hub.config(tmp_path, SWEEP, name="undisturbed"))
    config = hub.config(tmp_path, SWEEP)
    asked = StopSignals.asked
    for step in (1, 3, 6):

        def stop(self, done, step=step):
            self.received = signal.SIGTERM
            return done == step

        monkeypatch.setattr(StopSignals, "asked", stop)
        with pytest.raises(Stopped):
            run_sweep(config)
    monkeypatch.setattr(StopSignals, "asked", asked)
    again = run_sweep(config)
    assert [(r.name, r.status, r.steps) for r in again.results] == [(r.name, r.status, r.steps) for r in raced.results]
    assert not differing(bits_of_run(raced.path), bits_of_run(again.path))
    assert run_sweep(config).compiled_programs == 0


@pytest.mark.slow
def test_no_pack_keeps_its_programs_until_the_rung_ends(hub, tmp_path, monkeypatch):
    space = {"grid": {"adapter.rank": [1, 2]}, "halving": {"rungs": [1]}, "max_pack": 1}
    held, original = [], halving.Halving._scores

    def scores(self, trained):
        held.append(trained.pack.programs.compiled)
        return original(self, trained)

    monkeypatch.setattr(halving.Halving, "_scores", scores)
    run_sweep(hub.config(tmp_path, {"training.steps": 2, "training.eval_every": 0, "sweep": space}))
    assert len(held) == 3 and not any(held)


def many_members():
    """32 that differ in everything that may differ, at eight steps' worth of rungs for four survivors."""
    rates = np.geomspace(1e-6, 3e-3, 32)[np.random.default_rng(0).permutation(32)]
    return {
        "adapter.rank": [1 + i % 7 for i in range(32)],
        "adapter.targets": [MEMBERS["adapter.targets"][i % 6] for i in range(32)],
        "adapter.alpha": [4 + i for i in range(32)],
        "optimizer.weight_decay": [0.01 * (i % 3) for i in range(32)],
        "training.seed": list(range(32)),
        "optimizer.learning_rate": [float(r) for r in rates],
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("members", "halving", "left"), [(MEMBERS, {"factor": 2, "rungs": [2, 4]}, 2), (many_members(), {"factor": 2, "rungs": [1, 2, 4]}, 4)]
)
def test_scanned_survivors_have_the_bits_of_their_solo_runs(hub, tmp_path, members, halving, left):
    """One after the other in a loop, each member is computed by itself, in the shapes of the whole race."""
    scanned = race() | {"training.pack": "scan", "tracking.tensorboard": False}
    count = len(members["adapter.rank"])
    raced = run_sweep(
        hub.config(tmp_path, scanned | {"sweep": {"zip": members, "halving": halving | {"metric": "loss"}, "max_pack": count}})
    )
    solo = run_sweep(hub.config(tmp_path, scanned | {"sweep": {"zip": members}}, name="solo"), solo=True)
    alone = {r.name: r for r in solo.results}
    survivors = [r for r in raced.results if r.status == "finished"]
    assert len(survivors) == left
    if count == 32:
        assert sum(r.steps for r in raced.results) <= 0.45 * 8 * count
    for result in survivors:
        assert result.final == alone[result.name].final
        mine, theirs = (arrays_of(p / result.name / "final") for p in (raced.path, solo.path))
        assert mine.keys() == theirs.keys() and all(np.array_equal(mine[n], theirs[n]) for n in mine)


def test_what_cannot_race(hub, tmp_path):
    lengths = {"sweep": {"grid": {"training.batch_size": [4, 8]}, "halving": {"rungs": 1}}}
    with pytest.raises(InputError, match="must share model, task and training"):
        run_sweep(hub.config(tmp_path, lengths, name="a"))
    with pytest.raises(InputError, match="must increase"):
        run_sweep(hub.config(tmp_path, {"sweep": {"grid": {"adapter.rank": [1, 2]}, "halving": {"rungs": [6]}}}, name="b"))
    assert not list((tmp_path / "runs").glob("*"))
    with pytest.raises(InputError, match="has no 'accuracy'"):
        sweep = {"grid": {"adapter.rank": [1, 2]}, "halving": {"rungs": 1, "metric": "accuracy"}}
        run_sweep(hub.config(tmp_path, {"sweep": sweep}, causal=True, name="c"))
