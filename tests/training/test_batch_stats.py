"""`model.train_batch_stats`: batch norms that normalise training batches by their own statistics, with running ones for each member."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.config.load import load_config
from lora_jax.errors import InputError, Stopped
from lora_jax.models.convolution import BatchNorm
from lora_jax.models.load import load_model
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.restore import evaluate_run
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress
from lora_jax.training.setup import set_up
from lora_jax.training.trunk import trunk_depth
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call
from tests.tiny_images import save_squares, save_vision

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("statistics")
    for kind in ("resnet", "vit"):
        save_vision(folder / kind, kind)
    save_squares(folder / "train.npz", 48)
    save_squares(folder / "val.npz", 18, seed=1)
    return folder


def config(folder: Any, name: str, **changes: Any) -> Any:
    """A config file in the folder; `a__b` means `a.b`."""
    values: dict[str, Any] = {
        "name": name,
        "model": {"source": str(folder / "resnet"), "train_batch_stats": True},
        "task": {"kind": "image_classification", "source": str(folder / "train.npz"), "eval_source": str(folder / "val.npz")},
        "adapter": {"rank": 2, "targets": "convolutions"},
        "optimizer": {"learning_rate": 0.01, "eps": 1e-3},
        "training": {"steps": STEPS, "batch_size": 8, "accumulate": 2, "eval_every": 3},
        "tracking": {"dir": str(folder / "runs")},
    }
    for key, value in changes.items():
        part, _, rest = key.partition("__")
        values.setdefault(part, {})
        values[part] = values[part] | {rest: value} if rest else value
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def test_statistics_of_a_batch_and_running_ones() -> None:
    """Beside the equations in float64; in evaluation the running statistics are used and stay."""
    rng = np.random.default_rng(0)
    norm: Any = BatchNorm(5, 1e-3)
    norm.scale.set_value(jnp.asarray(rng.standard_normal(5), jnp.float32))
    norm.train(0.3)
    mean, var = np.zeros(5), np.ones(5)
    for _ in range(3):
        x = 2 + 3 * rng.standard_normal((4, 3, 2, 5))
        own, spread = x.mean((0, 1, 2)), x.var((0, 1, 2))
        wanted = (x - own) / np.sqrt(spread + 1e-3) * np.asarray(norm.scale[...])
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, atol=2e-5)
        mean, var = 0.7 * mean + 0.3 * own, 0.7 * var + 0.3 * spread * 24 / 23
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    with pytest.raises(InputError, match="given one value a channel"):
        norm(jnp.ones((1, 1, 1, 5)))
    norm.set_view(use_running_average=True)
    before = np.asarray(norm.mean[...])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), (x - mean) / np.sqrt(var + 1e-3) * np.asarray(norm.scale[...]), atol=2e-5)
    np.testing.assert_array_equal(norm.mean[...], before)


def test_where_there_is_nothing_to_train_or_drop(folder: Any) -> None:
    def error(**changes: Any) -> str:
        done = call("train", config(folder, "bad", **changes))
        assert done.code == 2 and "Traceback" not in done.err
        return done.err

    assert "model.train_batch_stats: true, but" in (said := error(model__source=str(folder / "vit"))) and "no batch norms" in said
    assert "model.dropout: 0.1, but the convolutional net" in error(model__dropout=0.1)
    assert "training.batch_size must divide by mesh.data" in error(mesh={"data": 8})


def test_blocks_whose_statistics_train_are_no_trunk(folder: Any) -> None:
    for train, depth in ((False, 1), (True, 0)):
        own = load_config(config(folder, "upper", adapter__layers="last:1", model__train_batch_stats=train))
        setup = set_up(own)
        part = Pack.build(setup.model, [own], STEPS).part
        assert trunk_depth(part, {name: array[0] for name, array in setup.plan.batch(0).items()}) == depth


@pytest.mark.slow
def test_a_pack_equals_its_solo_runs_each_with_statistics_of_its_own(folder: Any) -> None:
    changes: list[dict[str, Any]] = [{"adapter__rank": 1}, {"adapter__rank": 4, "optimizer__learning_rate": 0.03, "training__seed": 3}]
    configs = [load_config(config(folder, f"member{i}", **change)) for i, change in enumerate(changes)]
    setup = set_up(configs[0])

    def run(configs: Any) -> Any:
        pack = Pack.build(setup.model, configs, STEPS)
        state, losses = pack.state, []
        for step in range(STEPS):
            state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, setup.plan.batch(step), np.int32(step))
            losses.append(np.asarray(metrics.loss))
        assert pack.programs.train.traces.count == 1
        return np.stack(losses), pack, state

    losses, pack, state = run(configs)
    norms = [name for name, label in pack.part.labels.items() if label == "statistic"]
    assert len(norms) == 2 * 6 and not any(name in pack.part.frozen for name in norms)
    assert all(bool(np.any(np.asarray(state.trainable[n][0]) != np.asarray(state.trainable[n][1]))) for n in norms)
    assert pack.parameter_count(0) < 1000
    for k, own in enumerate(configs):
        alone, solo, ended = run([own])
        np.testing.assert_allclose(losses[:, k], alone[:, 0], rtol=1e-5)
        ours, theirs = pack.member_arrays(setup.model, k, state.trainable), solo.member_arrays(setup.model, 0, ended.trainable)
        for name, array in theirs.items():
            assert tiny.relative(ours[name], array) < 1e-5, name


@pytest.mark.slow
def test_a_run_is_saved_resumed_and_exported_with_its_statistics(folder: Any, monkeypatch: Any) -> None:
    options = {"sweep": {"grid": {"optimizer.learning_rate": [0.003, 0.03]}}, "tracking__checkpoint_every": 2}
    whole, broken = (load_config(config(folder, name, **options)) for name in ("whole", "broken"))
    run_sweep(whole, progress=Progress(enabled=False))
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_sweep(broken, progress=Progress(enabled=False))
    run_sweep(broken, progress=Progress(enabled=False))
    run = folder / "runs" / "whole"
    assert not differing(bits_of_run(run), bits_of_run(folder / "runs" / "broken"))

    again = evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False))
    results = {file.parent.name: json.loads(file.read_text()) for file in run.glob("**/results.json")}
    assert len(again) == 2
    for name, metrics in again.items():
        assert metrics["loss"] == pytest.approx(results[name]["best"]["loss"], rel=1e-5)
    done = call("export", run, "--format", "hf", "--out", folder / "exported")
    assert done.code == 0, done.err
    base, exported = (load_model(str(folder / name)) for name in ("resnet", "exported"))
    before, after = (np.asarray(m.stem_norm.mean[...]) for m in (base, exported))  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(before - after).max() > 1e-3
    done = call("export", run, "--format", "peft", "--out", folder / "peft")
    assert done.code == 2 and "running statistics of its own" in done.err
