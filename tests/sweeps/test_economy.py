"""What a sweep of 32 members that differ in everything but shapes costs: programs compiled, steps trained."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.packing.runner import PackRun
from lora_jax.sweeps.run import run_sweep
from tests import tiny

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.slow]

MEMBERS, KEPT, STEPS = 32, 4, 8
TARGETS = (["q_proj"], ["k_proj", "v_proj"], "attention", "mlp", "all-linear", ["down_proj"])
LAYERS = (None, "last:2", "last:1", "first:1", [0, 2], [1])


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def members():
    """Drawn: every key whose value is traced data."""
    rng = np.random.default_rng(0)

    def pick(values):
        return values[int(rng.integers(len(values)))]

    return [
        {
            "adapter.rank": int(rng.integers(1, 65)),
            "adapter.alpha": float(rng.uniform(1, 64)),
            "adapter.targets": pick(TARGETS),
            "adapter.layers": pick(LAYERS),
            "adapter.dropout": float(rng.uniform(0, 0.5)),
            "adapter.rslora": bool(rng.integers(2)),
            "optimizer.learning_rate": float(10 ** rng.uniform(-4, -2)),
            "optimizer.schedule": pick(["linear", "cosine", "constant"]),
            "optimizer.warmup_steps": int(rng.integers(3)),
            "optimizer.weight_decay": float(rng.uniform(0, 0.1)),
            "optimizer.clip_norm": float(rng.uniform(0.1, 2)),
            "optimizer.b1": float(rng.uniform(0.8, 0.95)),
            "optimizer.b_lr_ratio": float(rng.uniform(1, 16)),
            "training.seed": seed,
        }
        for seed in range(MEMBERS)
    ]


def changes(**sweep):
    values = {"training.steps": STEPS, "training.eval_every": 0, "tracking.tensorboard": False, "tracking.save": "none"}
    return values | {"sweep": {"members": members(), **sweep}}


@pytest.fixture
def trained(monkeypatch):
    """The packs of each run, as they were trained."""
    found, original = [], PackRun.train

    def noted(self, **options):
        found.append(original(self, **options))
        return found[-1]

    monkeypatch.setattr(PackRun, "train", noted)
    return found


@pytest.mark.long
def test_at_most_three_training_programs(hub, tmp_path, trained):
    outcome = run_sweep(hub.config(tmp_path, changes()))
    assert [r.status for r in outcome.results] == ["finished"] * MEMBERS and {r.steps for r in outcome.results} == {STEPS}
    programs = sum(p.train.traces.count for p in {one.pack.programs for one in trained})
    print({"members": MEMBERS, "packs": len(trained), "training programs": programs})
    assert programs <= 3 and sum(len(one.pack.configs) for one in trained) == MEMBERS


@pytest.mark.long
def test_halving_trains_less_than_half(hub, tmp_path):
    outcome = run_sweep(hub.config(tmp_path, changes(halving={"factor": 2, "rungs": 3})))
    steps = [r.steps for r in outcome.results]
    share = sum(steps) / (MEMBERS * STEPS)
    print({"member-steps": sum(steps), "of all": share, "steps": sorted(steps)})
    assert sum(r.status == "finished" for r in outcome.results) == KEPT == steps.count(STEPS)
    assert share <= 0.45
