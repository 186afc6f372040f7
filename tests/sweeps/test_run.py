"""Sweeps from end to end: packed against solo, divergence, language models, baselines."""

from __future__ import annotations

import math

import pytest

from lora_jax.errors import InputError
from lora_jax.sweeps import restore as evaluate
from lora_jax.sweeps.run import fit, run_sweep, sweep
from lora_jax.tracking import Progress

pytestmark = pytest.mark.usefixtures("compile_cache")


def final(outcome):
    return {r.name: r.final for r in outcome.results}


def assert_close(a, b, relative):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=relative), name


@pytest.mark.long
def test_a_packed_language_model_equals_its_solo_runs(hub, tmp_path):
    grid = {"adapter.rank": [2, 5]}
    changes = {"sweep": {"grid": grid}, "training.accumulate": 2, "adapter.targets": ["q_proj", "down_proj"]}
    packed = run_sweep(hub.config(tmp_path, changes, causal=True))
    solo = run_sweep(hub.config(tmp_path, changes, causal=True, name="solo"), solo=True)
    assert packed.compiled_programs == 2 and solo.compiled_programs == 4
    assert_close(final(packed), final(solo), 1e-5)
    assert set(final(packed)["rank=2"]) == {"loss", "perplexity", "token_accuracy"}
    assert final(packed)["rank=2"]["perplexity"] == pytest.approx(math.exp(final(packed)["rank=2"]["loss"]), rel=1e-5)
    assert final(packed)["rank=2"]["loss"] != final(packed)["rank=5"]["loss"]
    again = evaluate.evaluate_run(solo.path, member="rank=5", split="eval", progress=Progress(enabled=False))
    assert again["rank=5"] == pytest.approx(solo.results[1].best, rel=1e-6)


@pytest.mark.long
def test_packed_members_of_other_targets_and_layers_equal_their_solo_runs(hub, tmp_path):
    grid = {"adapter.rank": [1, 4], "adapter.targets": [["q_proj"], ["v_proj", "down_proj"]], "adapter.layers": [None, "last:1"]}
    changes = {"sweep": {"grid": grid}, "training.steps": 12}
    packed = run_sweep(hub.config(tmp_path, changes))
    solo = run_sweep(hub.config(tmp_path, changes, name="solo"), solo=True)
    assert packed.compiled_programs == 2 and len(packed.results) == 8
    assert_close(final(packed), final(solo), 1e-5)
    assert_close({r.name: r.best for r in packed.results}, {r.name: r.best for r in solo.results}, 1e-5)


@pytest.mark.slow
def test_a_member_that_diverges_leaves_the_others_alone(hub, tmp_path, recwarn):
    rates = [0.01, 1e30, 0.02]
    outcome = sweep(hub.config(tmp_path), {"optimizer.learning_rate": rates}, fresh=True)
    assert [r.status for r in outcome.results] == ["finished", "diverged", "finished"]
    assert all(math.isfinite(r.final["loss"]) for r in outcome.results[::2])
    alone = sweep(hub.config(tmp_path, name="others"), {"optimizer.learning_rate": [0.01, 0.015, 0.02]})
    assert_close(
        {k: v for k, v in final(outcome).items() if "e+30" not in k}, {k: v for k, v in final(alone).items() if "015" not in k}, 1e-6
    )
    assert not [w for w in recwarn if w.category is RuntimeWarning]
    # It has ended, and is not trained again when the run is resumed.
    assert sweep(hub.config(tmp_path), {"optimizer.learning_rate": rates}).compiled_programs == 0


@pytest.mark.slow
def test_baselines_train_what_they_say(hub, tmp_path):
    changes = {
        "sweep": {"grid": {"adapter.method": ["head", "full"]}},
        "optimizer.learning_rate": 0.001,
        "training.epochs": 0.5,
        "training.steps": None,
    }
    outcome = run_sweep(hub.config(tmp_path, changes))
    head, full = outcome.results
    assert head.parameters == 32 * 2 + 2 and full.parameters > 20_000
    assert head.steps == full.steps == 6  # half of 100 rows, 8 at a time
    # Training and evaluation of each, and for the head all of the base: a program of its own, in two batch shapes.
    assert outcome.compiled_programs == 6 and {r.status for r in outcome.results} == {"finished"}
    again = evaluate.evaluate_run(outcome.path, member=None, split="eval", progress=Progress(enabled=False))
    assert again["method=full"] == pytest.approx(full.best, abs=1e-6) and again["method=head"] == pytest.approx(head.best, abs=1e-6)


@pytest.mark.slow
def test_fit_trains_one_language_model_and_resumes_it(hub, tmp_path):
    path = str(hub.write(tmp_path, {"sweep": {"grid": {"adapter.rank": [2, 4]}}, "training.accumulate": 2}, causal=True))
    first = fit(path, training__steps=20, training__eval_every=0, name="one")
    assert (first.name, first.steps, first.best_step, first.status) == ("main", 20, 20, "finished")
    assert first.final["perplexity"] == pytest.approx(math.exp(first.final["loss"]), rel=1e-5)
    assert fit(path, training__steps=20, training__eval_every=0, name="one") == first
    with pytest.raises(InputError, match="another config"):
        fit(path, training__steps=5, name="one")


@pytest.mark.slow
def test_all_members_of_a_pack_may_diverge(hub, tmp_path, recwarn):
    outcome = sweep(hub.config(tmp_path), {"optimizer.learning_rate": [1e28, 1e29, 1e30]})
    assert [r.status for r in outcome.results] == ["diverged"] * 3
    assert not any(r.final["loss"] < 1e6 for r in outcome.results)  # NaN, or very large
    assert not [w for w in recwarn if w.category is RuntimeWarning]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_next_pack(hub, tmp_path, monkeypatch):
    from lora_jax.packing import runner as run

    config = hub.config(tmp_path, {"sweep": {"grid": {"training.seed": [0, 1]}, "max_pack": 1}})
    real, calls = run.train_pack, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "train_pack", once)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config)
    done = (tmp_path / "runs/tiny/seed=0/results.json").read_bytes()
    outcome = run_sweep(config)
    assert [r.name for r in outcome.results] == ["seed=0", "seed=1"] and len(calls) == 3
    assert (tmp_path / "runs/tiny/seed=0/results.json").read_bytes() == done
