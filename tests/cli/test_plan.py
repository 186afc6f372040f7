"""`lora-jax sweep CONFIG --plan`: what a sweep would take; nothing is trained, nothing written."""

from __future__ import annotations

import re

import pytest

from lora_jax.packing.cost import PackMemory, PackShapes
from lora_jax.packing.pack import Pack
from lora_jax.packing.runner import PackRun
from lora_jax.sweeps.halving import halving_fraction
from lora_jax.sweeps.plan import estimate
from lora_jax.sweeps.run import run_sweep
from tests import tiny
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

SWEEP = {"sweep": {"grid": {"adapter.rank": [2, 4], "adapter.bias": ["none", "all"]}}}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture
def untrained(monkeypatch):
    """Fails where anything is trained, or a pack's arrays are made."""
    monkeypatch.setattr(PackRun, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(Pack, "build", lambda *_, **__: pytest.fail("a pack was built"))


@pytest.mark.slow
def test_it_tells_packs_members_memory_flops_and_time(hub, tmp_path, untrained):
    config = hub.write(tmp_path, SWEEP)
    before = sorted(tmp_path.rglob("*"))
    told = call("sweep", config, "sweep.memory_limit=1GB", "--plan")
    assert told.code == 0, told.err
    assert sorted(tmp_path.rglob("*")) == before
    assert "4 members, 0 of them done; packs to train: 2, training programs: 2" in told.out
    for name in ("rank=2,bias=none", "rank=4,bias=none", "rank=2,bias=all", "rank=4,bias=all"):
        assert name in told.out
    assert "pack 1: rank=2,bias=none  rank=4,bias=none" in told.out
    assert re.search(r"trained state, 2 x [\d.]+ [KM]B", told.out) and re.search(r"activations, 2 x [\d.]+ [KM]B", told.out)
    assert re.search(r"limit +1 GB", told.out)
    assert "The time is an estimate" in told.out and re.search(r"about \d+ s", told.out)
    assert re.search(r"[\d.]+ [MG] FLOPs \(matrix products", told.out)


@pytest.mark.slow
def test_members_with_arrays_as_large_as_the_weights_are_scanned_and_it_says_why(hub, tmp_path, untrained):
    changes = {"adapter": {"method": "loha", "targets": ["q_proj"]}, "sweep": {"grid": {"adapter.rank": [2, 4]}}}
    told = call("sweep", config := hub.write(tmp_path, changes), "--plan")
    assert told.code == 0, told.err
    why = "'loha' needs arrays as large as the weights it adapts, so the members run one after the other"
    assert " ".join(told.out.split()).count(why) == 1
    told = call("sweep", config, "training.pack=vmap", "--plan")
    assert told.code == 0 and "one after the other" not in told.out
    told = call("sweep", config, "adapter.method=lora", "--plan")
    assert told.code == 0 and "one after the other" not in told.out


def test_bad_input_is_told_as_ever(hub, tmp_path, untrained):
    for change, said in (
        ("adapter.rank=0", "adapter.rank"),
        ("adapter.targets=[nowhere]", "nowhere"),
        ("sweep.max_padding=2", "max_padding"),
    ):
        told = call("sweep", hub.write(tmp_path, SWEEP), change, "--plan")
        assert told.code == 2 and said in told.err and "Traceback" not in told.err and not told.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_what_is_done_is_not_planned_again(hub, tmp_path, monkeypatch):
    """Of a run that is there: what is left, and other configs are refused."""
    monkeypatch.setattr(PackShapes, "memory", lambda self, members: PackMemory(1, 1, 1, 1))  # nothing to compile for
    grid = {"sweep": {"grid": {"adapter.rank": [2, 3]}}, "training.steps": 2, "training.eval_every": 0}
    run_sweep(hub.config(tmp_path, grid))
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    done = call("sweep", hub.write(tmp_path, grid), "--plan")
    assert done.code == 0 and "2 members, 2 of them done; packs to train: 0, training programs: 0" in done.out
    grown = estimate(hub.config(tmp_path, grid | {"sweep": {"grid": {"adapter.rank": [2, 3, 4]}}}))
    assert [[m.name for m in p.plan.members] for p in grown.packs] == [["rank=4"]] and grown.ended == 2
    fresh = estimate(hub.config(tmp_path, grid), fresh=True)
    assert [len(p.plan.members) for p in fresh.packs] == [2] and fresh.ended == 0
    refused = call("sweep", hub.write(tmp_path, grid | {"adapter.alpha": 3.0}), "--plan")
    assert refused.code == 2 and "adapter.alpha" in refused.err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")} == written


def test_halving_trains_less():
    assert halving_fraction(32, 2, [1, 2, 4], 8) == 0.3125
    assert halving_fraction(6, 2, [2, 4], 8) == pytest.approx((6 * 2 + 3 * 2 + 2 * 4) / 48)


@pytest.mark.slow
def test_it_finds_the_memory_that_the_plan_finds(hub, tmp_path):
    # Two packs: two small members, and one of larger batches that takes more.
    path = hub.write(tmp_path, {"sweep": {"members": [{"adapter.rank": 1}, {"adapter.rank": 2}, {"training.batch_size": 48}]}})
    plan, doctor = call("sweep", path, "--plan"), call("doctor", path)

    def memory(out):
        lines = out[out.index("memory per device") :].splitlines()[1:]
        return [" ".join(line.split()) for line in lines if line.startswith(("base", "batch", "trained", "activations", "total  "))]

    assert plan.code == 0, plan
    assert memory(plan.out) and memory(plan.out) == memory(doctor.out)
