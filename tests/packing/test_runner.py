"""Packs that do not fit into memory go on in halves, and members that failed are recorded and tried again by name."""

from __future__ import annotations

import json
import signal

import jax
import numpy as np
import pytest

from lora_jax.errors import OutOfMemory, Stopped
from lora_jax.packing.choice import check_fits, choose, first_batch
from lora_jax.packing.execution import VMAP, PackMode
from lora_jax.packing.pack import Pack
from lora_jax.packing.planner import Planner
from lora_jax.parallel.processes import StopSignals
from lora_jax.parallel.program import Program, program_bytes
from lora_jax.sweeps.run import run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import MemberResult
from lora_jax.training.setup import set_up
from tests import tiny
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

GRID = {"adapter.rank": [2, 4], "training.seed": [0, 1]}
NAMES = ["rank=2,seed=0", "rank=2,seed=1", "rank=4,seed=0", "rank=4,seed=1"]
CHANGES = {
    "sweep": {"grid": GRID},
    "training.pack": "vmap",
    "training.eval_every": 0,
    "tracking.checkpoint_every": 3,
    "tracking.tensorboard": False,
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def undisturbed(hub, tmp_path_factory, compile_cache, quick):
    return run_sweep(hub.config(tmp_path_factory.mktemp("undisturbed"), CHANGES))


def check_equal(outcome, undisturbed):
    assert [(r.name, r.status, r.steps) for r in outcome.results] == [(n, "finished", 6) for n in NAMES]
    for ours, theirs in zip(outcome.results, undisturbed.results, strict=True):
        assert ours.final == pytest.approx(theirs.final, rel=1e-5), ours.name


def splits(path):
    return [(s["pack"], s["parts"]) for s in json.loads((path / "state.json").read_text())["splits"]]


def needed(setup, config, count):
    """Bytes of the larger of the two programs of a pack of the first members."""
    pack = Pack.build(setup.model, [m.config for m in members_of(config)][:count], setup.steps, setup.mesh)
    compiled = pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, first_batch(pack, setup, None), np.int32(0)).compile()
    return program_bytes(compiled)


@pytest.mark.slow
def test_a_pack_above_the_limit_goes_on_in_halves(hub, tmp_path, undisturbed, monkeypatch):
    """Where the planner was wrong about it."""
    monkeypatch.setattr(Planner, "_fitting", lambda self, setup, configs, most: most)
    config = hub.config(tmp_path, CHANGES)
    setup = set_up(config)
    two, four = (needed(setup, config, count) for count in (2, 4))
    assert two < 0.8 * four
    limit = (two + four) // 2
    limited = hub.config(tmp_path, CHANGES | {"sweep": {"grid": GRID, "memory_limit": limit}})
    outcome = run_sweep(limited)
    check_equal(outcome, undisturbed)
    assert splits(outcome.path) == [(NAMES, [NAMES[:2], NAMES[2:]])]
    assert "the training program needs" in json.loads((outcome.path / "state.json").read_text())["splits"][0]["why"]
    # Where the mode is open, one that fits is taken, and the pack stays whole.
    configs = [m.config.model_copy(update={"training": config.training.model_copy(update={"pack": "auto"})}) for m in members_of(limited)]
    pack = Pack.build(setup.model, configs, setup.steps, setup.mesh)
    assert choose(pack, setup, None).mode == pack.programs.mode == PackMode(1)
    check_fits(pack, setup, None)
    pack.use_mode(VMAP)
    with pytest.raises(OutOfMemory, match=r"needs .*B on a device; the limit is .*B"):
        check_fits(pack, setup, None)


def exhausted(monkeypatch, at, larger_than, times=99):
    """The device refuses to train step `at` of packs that are larger."""
    real, left = Program.__call__, [times]

    def run(self, *args):
        if self._name == "training" and args[0].alive.size > larger_than and int(args[4]) == at and left[0]:
            left[0] -= 1
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 77 bytes.")
        return real(self, *args)

    monkeypatch.setattr(Program, "__call__", run)


@pytest.mark.long
def test_what_was_trained_is_kept_and_a_resumed_run_makes_the_same_splits(hub, tmp_path, undisturbed, monkeypatch):
    exhausted(monkeypatch, at=4, larger_than=2)
    begun, asked = [], StopSignals.asked

    def stop(self, done):
        begun.append(done)
        self.received = signal.SIGTERM
        return len(begun) == 4 + 2 + 1  # 4 steps of all, 2 of the first half (the last is not asked about), 1 of the second

    monkeypatch.setattr(StopSignals, "asked", stop)
    config = hub.config(tmp_path, CHANGES)
    with pytest.raises(Stopped):
        run_sweep(config)
    assert begun == [1, 2, 3, 4, 4, 5, 4]  # both halves go on from the checkpoint of step 3
    monkeypatch.setattr(StopSignals, "asked", asked)
    outcome = run_sweep(config)
    check_equal(outcome, undisturbed)
    assert splits(outcome.path) == [(NAMES, [NAMES[:2], NAMES[2:]])]
    assert outcome.compiled_programs == 2  # the second half alone


@pytest.mark.long
def test_a_member_that_fits_nowhere_fails_alone(hub, tmp_path, undisturbed, monkeypatch):
    """The first time the device has no room for a single member, it is recorded; the rest goes on; it is tried again by name."""
    exhausted(monkeypatch, at=0, larger_than=0, times=3)  # the four, the two, the one
    file = hub.write(tmp_path, CHANGES)
    said = call("sweep", file)
    path = tmp_path / "runs/tiny"
    assert said.code == 1 and "Traceback" not in said.err
    assert "1 member failed" in said.err and f"--retry '{NAMES[0]}'" in said.err
    assert f"{NAMES[0]}: OutOfMemory: member '{NAMES[0]}' does not fit into memory: RESOURCE_EXHAUSTED" in said.err
    result = MemberResult.read(path / NAMES[0])
    assert result.status == "failed" and "RESOURCE_EXHAUSTED" in result.error and not result.final
    assert "JaxRuntimeError" in (path / NAMES[0] / "error.txt").read_text()
    assert {MemberResult.read(path / n).status for n in NAMES[1:]} == {"finished"} and (path / "report.html").exists()
    assert f"\n{NAMES[0]}," in (path / "results.csv").read_text().replace('"', "")
    # Nothing is trained again by itself, and the exit code says that something is missing.
    before = (path / NAMES[1] / "results.json").read_bytes()
    assert call("sweep", file).code == 1
    unknown = call("sweep", file, "--retry", "rank=2,sed=0")
    assert unknown.code == 2 and f"Did you mean '{NAMES[0]}'" in unknown.err
    finished = call("sweep", file, "--retry", NAMES[1])
    assert finished.code == 2 and f"'{NAMES[1]}' is finished" in finished.err
    again = call("sweep", file, "--retry", "rank=2,*")
    assert again.code == 0, again.err
    check_equal(run_sweep(hub.config(tmp_path, CHANGES)), undisturbed)
    assert (path / NAMES[0] / "results-retried-1.json").exists() and (path / NAMES[1] / "results.json").read_bytes() == before


@pytest.mark.slow
def test_a_pack_that_breaks_leaves_the_others_and_goes_on_from_its_checkpoint(hub, tmp_path, undisturbed, monkeypatch):
    """Two packs; the first breaks after its checkpoint. One of its members is tried again, and goes on from there."""
    real, begun = Program.__call__, []

    def broken(self, *args):
        if self._name == "training":
            begun.append(int(args[4]))
            if len(begun) == 5:
                raise ValueError("a broken thing")
        return real(self, *args)

    monkeypatch.setattr(Program, "__call__", broken)
    config = hub.config(tmp_path, CHANGES | {"sweep": {"grid": GRID, "max_pack": 2}})
    outcome = run_sweep(config)
    assert [r.status for r in outcome.results] == ["failed", "failed", "finished", "finished"]
    assert outcome.results[0].error == "ValueError: a broken thing"
    begun.clear()
    begun.extend([0] * 5)
    again = run_sweep(config, retry=[NAMES[1]])
    assert begun[5:] == [3, 4, 5] and [r.status for r in again.results] == ["failed", "finished", "finished", "finished"]
    assert again.results[1].final == pytest.approx(undisturbed.results[1].final, rel=1e-5)


@pytest.mark.slow
def test_a_member_that_diverged_is_tried_again_from_the_start(hub, tmp_path):
    rates = {"grid": {"optimizer.learning_rate": [0.01, 1e30]}}
    config = hub.config(tmp_path, CHANGES | {"sweep": rates})
    assert [r.status for r in run_sweep(config).results] == ["finished", "diverged"]
    again = run_sweep(config, retry=["*"])
    assert again.compiled_programs == 2 and [r.status for r in again.results] == ["finished", "diverged"]
    assert list(again.path.glob("*/results-retried-1.json")) == [again.path / "learning_rate=1e+30" / "results-retried-1.json"]
