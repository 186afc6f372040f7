"""A sweep that is killed again and again, and grows: each member is trained to its last step once, and the results are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time

import jax
import pytest

from lora_jax.config.load import load_config
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import read_state
from tests import tiny

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.long]

CHANGES = {
    "training.steps": 6,
    "training.eval_every": 3,
    "tracking.checkpoint_every": 2,
    "tracking.tensorboard": False,
    "adapter.dropout": 0.1,
}
# Two packs of two; then two members more, for whom there is no room in those.
SWEEP = {"grid": {"adapter.rank": [2, 3], "training.seed": [0, 1]}, "max_pack": 2}
GROWN = {"grid": {"adapter.rank": [2, 3, 4], "training.seed": [0, 1]}, "max_pack": 2}
# Killed in the first pack, when the first of its members is recorded, and in the second.
KILLS = ("checkpoints/*/2", "*/results.json", "checkpoints/*/4")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def _child(config: str, cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with tiny.quick_compile():  # as in the run that is compared with: other passes, other bits
        run_sweep(load_config(config))


def killed_when(context, config, run, pattern):
    """Starts the sweep and kills it as soon as another path that matches exists; whether it was."""
    seen = set(run.glob(pattern))
    process = context.Process(target=_child, args=(str(config), jax.config.jax_compilation_cache_dir))
    process.start()
    while process.is_alive() and not set(run.glob(pattern)) - seen:
        time.sleep(0.0005)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(120)
    return process.exitcode == -signal.SIGKILL


def ended(run):
    """File -> when it was written, of the members that have ended."""
    return {p: p.stat().st_mtime_ns for p in run.glob("*/results.json")}


def results(path):
    return {json.loads(p.read_text())["name"]: json.loads(p.read_text()) for p in path.glob("*/results.json")}


def test_each_member_is_trained_to_its_end_once(hub, tmp_path):
    whole = run_sweep(hub.config(tmp_path, CHANGES | {"sweep": SWEEP}, name="whole")).path
    config = hub.write(tmp_path, CHANGES | {"sweep": SWEEP})
    run = tmp_path / "runs" / "tiny"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_jax.sweeps.run", "lora_jax.models.load", __name__, "grain", "datasets"])
    before, kills = {}, 0
    for pattern in KILLS:
        kills += killed_when(context, config, run, pattern)
        assert before.items() <= ended(run).items()  # who had ended is not trained again
        before = ended(run)
    assert kills == 3 and 2 <= len(before) < 4
    plan = read_state(run).plan
    run_sweep(load_config(config))
    assert before.items() <= ended(run).items() and read_state(run).plan == plan
    assert (run / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert {r["steps"] for r in results(run).values()} == {6} and len(results(run)) == 4
    assert run_sweep(load_config(config)).compiled_programs == 0

    before = ended(run)
    grown = hub.write(tmp_path, CHANGES | {"sweep": GROWN})
    assert killed_when(context, grown, run, "checkpoints/*/2")
    run_sweep(load_config(grown))
    assert before.items() <= ended(run).items()
    undisturbed = run_sweep(hub.config(tmp_path, CHANGES | {"sweep": GROWN}, name="grown")).path
    assert_same(run, undisturbed)
    shutil.rmtree(run)


def assert_same(run, other):
    """The same rows of `results.csv`, and the same figures to what other packs, and so other programs, make of them."""
    lines, expected = ((p / "results.csv").read_text().splitlines() for p in (run, other))
    assert lines[0] == expected[0] and len(lines) == len(expected) == 7
    mine, theirs = results(run), results(other)
    assert mine.keys() == theirs.keys()
    for name, result in mine.items():
        for key in ("settings", "parameters", "status", "steps", "tokens", "best_step"):
            assert result[key] == theirs[name][key], (name, key)
        assert result["final"]["loss"] == pytest.approx(theirs[name]["final"]["loss"], rel=1e-5)
        assert result["final"]["accuracy"] == theirs[name]["final"]["accuracy"]
