"""Every kind of optimizer: beside its equations in float64, in packs, moved between packs, resumed; and its keys in a config."""

from __future__ import annotations

import contextlib
import csv
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.adapters.layout import resolve, unite
from lora_jax.config.doors import OPTIMIZERS
from lora_jax.config.load import with_values
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack, repack, static_key
from lora_jax.sweeps.restore import evaluate_run
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress
from lora_jax.training.checkpoint import PackCheckpoints, Saved
from lora_jax.training.optimizer import eval_params, hyper_of, learning_rate, make_optimizer
from lora_jax.training.optimizers.base import optimizer_of
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

KINDS = [name for name, one in OPTIMIZERS.all().items() if type(one).__module__.startswith("lora_jax.")]
# Kind -> its own keys of two members.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({"eps": 1e-3}, {"eps": 1e-3, "b1": 0.8}),
    "adafactor": ({"parameter_scale": True, "eps": 1e-8}, {"decay_rate": 0.7, "clip_threshold": 0.5, "eps": 1e-8}),
    "sgd": ({"nesterov": True}, {"momentum": 0.5}),
    "lion": ({"b2": 0.95}, {"b1": 0.8}),
    "muon": ({"eps": 1e-3}, {"momentum": 0.8, "rms": 0.1, "eps": 1e-3}),
    "schedule_free": ({"eps": 1e-3, "schedule": "constant"}, {"eps": 1e-3, "b1": 0.8, "schedule": "constant"}),
    "riemannian": ({"eps": 1e-3, "delta": 1e-2}, {"eps": 1e-3, "delta": 1e-1}),
}


def config(kind: str, **values: Any) -> Any:
    own = {key: values.pop(key) for key in list(values) if "__" in key}
    return tiny.config(**own, **{f"optimizer__{k}": v for k, v in ({"kind": kind} | values).items()})


def members(kind: str) -> list[Any]:
    """Two, of unequal rank, targets, layers and numbers."""
    first = {"adapter__rank": 6, "adapter__targets": ["q_proj", "down_proj"], "weight_decay": 0.1, "training__seed": 3}
    second = {"adapter__rank": 2, "adapter__targets": ["q_proj"], "adapter__layers": "last:1", "b_lr_ratio": 2.0, "clip_norm": 0.5}
    return [config(kind, learning_rate=r, **v, **own) for v, r, own in zip((first, second), (3e-3, 1e-2), OWN[kind], strict=True)]


def train(pack: Pack, state: Any, steps: range) -> Any:
    for step in steps:
        state, _ = pack.programs.train(state, pack.fixed, pack.part.frozen, tiny.batch(step % 3), np.int32(step))
    return state


def close(mine: dict[str, Any], wanted: dict[str, Any], start: dict[str, Any], limit: float = 1e-5) -> None:
    assert mine.keys() == wanted.keys()
    for name, array in wanted.items():
        moved = np.linalg.norm(array - start[name])
        assert np.linalg.norm(mine[name] - array) <= limit * np.linalg.norm(array) + 1e-3 * moved, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k in ("adafactor", "muon") else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_a_pack_equals_its_solo_run_and_a_member_moves_to_another(kind: str) -> None:
    model, chosen = tiny.classifier(2), members(kind)
    pack, alone = Pack.build(model, chosen, 10), Pack.build(model, chosen[1:], 10)
    start, own = (alone.member_arrays(model, 0, alone.state.trainable) for _ in range(2))
    half = jax.tree.map(np.asarray, train(pack, pack.state, range(4)))
    together = train(pack, jax.tree.map(jnp.asarray, half), range(4, 10))
    mine = pack.member_arrays(model, 1, together.trainable)
    loop = {"best": {"score": [0] * 2, "step": [0] * 2, "metrics": {}}, "window": [], "final": {}, "tokens": 0, "seconds": 0.0}
    moved = repack(model, [(pack, 1, Saved(4, half, None, loop))], alone)
    went_on = train(alone, moved.state, range(4, 10))
    solo = train(alone, Pack.build(model, chosen[1:], 10).state, range(10))
    own = alone.member_arrays(model, 0, solo.trainable)
    close(mine, own, start)
    close(alone.member_arrays(model, 0, went_on.trainable), own, start)
    assert all(np.linalg.norm(own[name] - start[name]) > 0 for name in own)
    assert pack.programs.train.traces.count == alone.programs.train.traces.count == 1
    evaluated = [p.member_arrays(model, k, p.eval_params(s)) for p, k, s in ((pack, 1, together), (alone, 0, solo))]
    close(evaluated[0], evaluated[1], start)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "schedule_free"])
def test_a_checkpoint_goes_on_with_the_same_bits(kind: str, tmp_path: Any) -> None:
    model, chosen = tiny.classifier(1), [config(kind, **OWN[kind][0])]
    pack = Pack.build(model, chosen, 6)
    with contextlib.closing(PackCheckpoints(tmp_path / "pack", ["a"], "base", keep=2, warn=print)) as checkpoints:
        state = train(pack, pack.state, range(3))
        checkpoints.save(3, state, {}, pack.kept)
        checkpoints.wait()
        saved = checkpoints.restore(Pack.build(model, chosen, 6).state, pack.kept)
    assert saved is not None and saved.step == 3
    assert tiny.arrays_equal(train(pack, saved.state, range(3, 6)), train(pack, state, range(3, 6)))


LABELS = {"a": "adapter_a", "b": "adapter_b", "head": "head", "norm.scale": "norm"}
SHAPES = {"a": (2, 6, 3), "b": (2, 3, 5), "head": (4, 3), "norm.scale": (2, 6)}
AXES = {"a": ("layers", None, None), "b": ("layers", None, None), "norm.scale": ("layers", "embed")}
PART: Any = types.SimpleNamespace(labels=LABELS, parameters={}, axes=AXES, method=None)
STEPS = 10


def drawn(steps: int = STEPS) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Where arrays start, and a gradient a step."""
    rng = np.random.default_rng(0)
    start, *grads = ({n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(steps + 1))
    return start, grads


def run(one: Any, part: Any = PART, drawing: Any = None) -> tuple[dict[str, Any], Any]:
    """The arrays after the steps, and the optimizer's state."""
    start, grads = drawing or drawn()

    @jax.jit
    def steps(hyper: Any) -> Any:
        optimizer, params = make_optimizer(hyper, part), start
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return steps(hyper_of(one, STEPS))


def rates(one: Any) -> list[dict[str, float]]:
    """The learning rate of every array at each step."""
    o, hyper = one.optimizer, hyper_of(one, STEPS)
    times = {"b": o.b_lr_ratio, "head": o.head_lr_ratio}
    return [{n: float(learning_rate(hyper, t)) * times.get(n, 1.0) for n in LABELS} for t in range(STEPS)]


def decay_of(one: Any, name: str) -> float:
    return 0.0 if name == "norm.scale" else one.optimizer.weight_decay


def lion(one: Any, x: Any, g: Any, t: int, rate: float, decay: float, kept: dict[str, Any]) -> Any:
    o, m = one.optimizer, kept.setdefault("m", np.zeros_like(x))
    kept["m"] = o.b2 * m + (1 - o.b2) * g
    return x - rate * (np.sign(o.b1 * m + (1 - o.b1) * g) + decay * x)


def sgd(one: Any, x: Any, g: Any, t: int, rate: float, decay: float, kept: dict[str, Any]) -> Any:
    o, g = one.optimizer, g + decay * x
    kept["m"] = o.momentum * kept.get("m", 0) + g
    return x - rate * (g + o.momentum * kept["m"] if o.nesterov else kept["m"])


def adafactor(one: Any, x: Any, g: Any, t: int, rate: float, decay: float, kept: dict[str, Any]) -> Any:
    """The full second moment of a vector, the factored one of a matrix; arXiv:1804.04235, algorithms 4 and 5."""
    o, b2 = one.optimizer, 1 - (t + 1) ** -one.optimizer.decay_rate
    square, rms = g**2 + o.eps, lambda a: np.sqrt((a**2).mean())
    if x.ndim == 2:
        kept["r"] = b2 * kept.get("r", 0) + (1 - b2) * square.mean(1)
        kept["c"] = b2 * kept.get("c", 0) + (1 - b2) * square.mean(0)
        v = np.outer(kept["r"], kept["c"]) / kept["r"].mean()
    else:
        v = kept["v"] = b2 * kept.get("v", 0) + (1 - b2) * square
    u = g / np.sqrt(v)
    u = u / max(1, rms(u) / o.clip_threshold) * (max(1e-3, rms(x)) if o.parameter_scale else 1)
    return x - rate * (u + decay * x)


def muon(one: Any, x: Any, g: Any, t: int, rate: float, decay: float, kept: dict[str, Any]) -> Any:
    o, beta = one.optimizer, one.optimizer.momentum
    m = kept["m"] = beta * kept.get("m", 0) + (1 - beta) * g
    u = beta * m / (1 - beta ** (t + 2)) + (1 - beta) * g / (1 - beta ** (t + 1))
    u = u / np.linalg.norm(u)
    for _ in range(5):
        p = u @ u.T
        u = 3.4445 * u + (-4.7750 * p + 2.0315 * p @ p) @ u
    return x - rate * (o.rms * math.sqrt(max(x.shape)) * u + decay * x)


def adamw(one: Any, x: Any, g: Any, t: int, rate: float, decay: float, kept: dict[str, Any]) -> Any:
    o = one.optimizer
    m = kept["m"] = o.b1 * kept.get("m", 0) + (1 - o.b1) * g
    v = kept["v"] = o.b2 * kept.get("v", 0) + (1 - o.b2) * g**2
    u = m / (1 - o.b1 ** (t + 1)) / (np.sqrt(v / (1 - o.b2 ** (t + 1))) + o.eps)
    return x - rate * (u + decay * x)


def reference(one: Any, function: Any, others: Any = None, matrices: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Each layer by itself, in float64; arrays that are no matrices of a model by `others`."""
    start, grads = drawn()
    found = {}
    for name, array in start.items():
        stacked = name in AXES
        layers = [a.astype(np.float64) for a in (array if stacked else array[None])]
        rule = others if others is not None and name not in matrices else function
        kept: list[dict[str, Any]] = [{} for _ in layers]
        for t, g in enumerate(grads):
            each, rate = (g[name] if stacked else g[name][None]).astype(np.float64), rates(one)[t][name]
            layers = [rule(one, x, d, t, rate, decay_of(one, name), k) for x, d, k in zip(layers, each, kept, strict=True)]
        found[name] = np.stack(layers) if stacked else layers[0]
    return found


COMMON = {"learning_rate": 0.05, "weight_decay": 0.2, "b_lr_ratio": 3.0, "head_lr_ratio": 0.5, "warmup_steps": 2, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lion, {"b1": 0.8, "b2": 0.95}),
        (sgd, {"nesterov": False}),
        (sgd, {"momentum": 0.7, "nesterov": True}),
        (adafactor, {"clip_threshold": 0.7}),
        (adafactor, {"parameter_scale": True, "decay_rate": 0.6}),
        (adamw, {"b2": 0.9}),
    ],
)
def test_equals_its_equations_in_float64(function: Any, values: dict[str, Any]) -> None:
    one, (start, _) = config(function.__name__, **(COMMON | values)), drawn()
    found, wanted = run(one)[0], reference(one, function)
    for name, array in wanted.items():
        assert tiny.relative(found[name] - start[name], array - start[name]) < 3e-5, name


@pytest.mark.slow
def test_muon_is_for_matrices_and_adamw_for_the_rest() -> None:
    one, (start, _) = config("muon", **COMMON, momentum=0.9, rms=0.3), drawn()
    found, wanted = run(one)[0], reference(one, muon, adamw, ("a", "b"))
    for name, array in wanted.items():  # five steps of a quintic magnify what float32 rounds
        assert tiny.relative(found[name] - start[name], array - start[name]) < 2e-4, name


@pytest.mark.slow
def test_muon_is_optaxs() -> None:
    one = config("muon", learning_rate=0.05, schedule="constant", weight_decay=0.1)
    theirs: Any = optax.contrib.muon(0.05, weight_decay=0.1, consistent_rms=0.2)
    start, grads = drawn()
    params: Any = {n: start[n][0] for n in ("a", "b")}
    state = theirs.init(params)
    for g in grads:
        updates, state = theirs.update({n: g[n][0] for n in params}, state, params)
        params = optax.apply_updates(params, updates)
    found = run(one)[0]
    for name in params:
        assert tiny.relative(found[name][0], params[name]) < 1e-4


def test_schedule_free_is_optaxs_and_is_evaluated_with_the_mean() -> None:
    one = config("schedule_free", learning_rate=0.05, schedule="constant", weight_decay=0.1, b1=0.8, warmup_steps=4)
    found, state = run(one)
    start, grads = drawn()
    hyper = hyper_of(one, STEPS)
    mask = {name: name != "norm.scale" for name in start}
    base = optax.chain(
        optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(lambda t: learning_rate(hyper, t)),
    )
    theirs: Any = optax.contrib.schedule_free(base, lambda t: learning_rate(hyper, t), 0.8)
    params: Any = start
    own = theirs.init(jax.tree.map(jnp.asarray, params))
    for g in grads:
        updates, own = theirs.update(g, own, params)
        params = optax.apply_updates(params, updates)
    mean: Any = optax.contrib.schedule_free_eval_params(own, params)
    evaluated = eval_params(PART, hyper, state, found)
    for name in start:
        assert tiny.relative(found[name], params[name]) < 1e-5
        assert tiny.relative(evaluated[name], mean[name]) < 1e-5
        assert tiny.relative(evaluated[name], found[name]) > 1e-4


def test_riemannian_multiplies_by_the_other_factors_inverse() -> None:
    model = tiny.classifier(1)
    one = config("riemannian", adapter__targets=["q_proj"], adapter__rank=3, delta=0.01, schedule="constant")
    pack = Pack.build(model, [one], STEPS)
    a, b = (next(n for n in pack.part.trainable if n.endswith(f"q_proj.lora_{x}")) for x in "ab")
    rng = np.random.default_rng(0)
    now, gradients = ({n: jnp.asarray(rng.standard_normal(v.shape), jnp.float32) for n, v in pack.part.trainable.items()} for _ in range(2))
    optimizer = optimizer_of(one.optimizer)
    found = optimizer.preconditioned(gradients, now, pack.part, hyper_of(one, STEPS).numbers)
    (wa, wb), (ga, gb) = ([np.asarray(tree[n], np.float64)[0] for n in (a, b)] for tree in (now, gradients))
    own = 0.01 * np.eye(3)
    assert tiny.relative(found[a][0], ga @ np.linalg.inv(wb @ wb.T + own)) < 1e-5
    assert tiny.relative(found[b][0], np.linalg.inv(wa.T @ wa + own) @ gb) < 1e-5
    assert all(found[n] is gradients[n] for n in gradients if n not in (a, b))


@pytest.mark.parametrize("method", ["ia3", "lora_fa", "head", "loha"])
def test_riemannian_refuses_a_method_without_a_pair_of_factors(method: str) -> None:
    model = tiny.classifier(1)
    layout = unite(model, [resolve(model, tiny.adapter(method=method, rank=2))])
    with pytest.raises(InputError, match=rf"optimizer.kind: 'riemannian'.*'{method}'"):
        optimizer_of(config("riemannian").optimizer).check(layout)


def test_the_kinds_in_a_config() -> None:
    one = tiny.config(optimizer__b1=0.7, optimizer__weight_decay=0.3)
    assert one.optimizer.kind == "adamw"
    other = with_values(one, {"optimizer.kind": "lion"})
    lion: Any = other.optimizer
    assert (lion.b1, lion.b2, lion.weight_decay) == (0.7, 0.99, 0.3)
    assert static_key(other) != static_key(one) == static_key(tiny.config(optimizer__eps=1e-4))
    with pytest.raises(InputError, match=r"optimizer.schedule: must be 'constant', got 'linear'"):
        with_values(one, {"optimizer.kind": "schedule_free"})
    changed = with_values(one, {"optimizer.kind": "schedule_free", "optimizer.schedule": "constant"})
    assert changed.optimizer.model_dump()["b1"] == 0.7
    with pytest.raises(InputError, match=r"'optimizer.nesterov' belongs to sgd"):
        with_values(one, {"optimizer.nesterov": True})
    with pytest.raises(InputError, match=r"optimizer.kind.*adamw"):
        with_values(one, {"optimizer.kind": "adamax"})


@pytest.mark.long
def test_a_sweep_over_kinds_and_methods_saves_what_it_evaluated(hub: Any, tmp_path: Any) -> None:
    members = [
        {"optimizer.kind": "schedule_free", "optimizer.schedule": "constant"},
        {"optimizer.kind": "muon", "optimizer.momentum": 0.9},
        {"optimizer.kind": "adafactor", "adapter.method": "ln_tuning"},
        {"optimizer.kind": "sgd", "adapter.method": "bitfit"},
        {"optimizer.kind": "riemannian", "adapter.rank": 4},
    ]
    done = run_sweep(hub.config(tmp_path, {"sweep": {"members": members}, "training.eval_every": 0}))
    rows = list(csv.DictReader((done.path / "results.csv").open()))
    assert len(rows) == 5 and {row["status"] for row in rows} == {"finished"}
    again = evaluate_run(done.path, member=None, split="eval", progress=Progress(enabled=False))
    assert len(again) == 5
    for row in rows:
        assert again[row["name"]]["loss"] == pytest.approx(float(row["final_loss"]), rel=1e-4)
    refused = {"sweep": {"grid": {"adapter.method": ["lora", "ia3"]}}, "optimizer.kind": "riemannian"}
    with pytest.raises(InputError, match=r"optimizer.kind: 'riemannian'.*'ia3'"):
        run_sweep(hub.config(tmp_path, refused, name="refused"))
