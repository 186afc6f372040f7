"""The optimizer against AdamW written out in float64, and the schedules against values by hand."""

from __future__ import annotations

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training.optimizer import SCHEDULES, Hyper, hyper_of, learning_rate, make_optimizer
from tests import tiny

LABELS = {"a": "adapter_a", "b": "adapter_b", "head": "head", "base": "frozen", "norm": "norm"}


def trained(labels):
    """What the optimizer is told of these arrays: they are no method's own."""
    return types.SimpleNamespace(labels=labels, parameters={}, axes={}, method=None)


def _hyper(**values) -> Hyper:
    steps = values.pop("steps", 10)
    return hyper_of(tiny.config(**{f"optimizer__{k}": v for k, v in values.items()}), steps)


def _rate(hyper, steps=range(11)):
    return [float(learning_rate(hyper, np.int32(s))) for s in steps]


def test_linear_schedule():
    assert _rate(_hyper(learning_rate=2.0)) == pytest.approx([2 * (10 - s) / 10 for s in range(11)])
    warm = [0, 0.5, 1.0, 1.5, *(2 * (10 - s) / 6 for s in range(4, 11))]
    assert _rate(_hyper(learning_rate=2.0, warmup_steps=4)) == pytest.approx(warm)


def test_cosine_schedule():
    cosine = [0, 1.0, *(1 + math.cos(math.pi * (s - 2) / 8) for s in range(2, 11))]
    assert _rate(_hyper(learning_rate=2.0, schedule="cosine", warmup_steps=2)) == pytest.approx(cosine, abs=1e-6)


def test_constant_schedule():
    assert _rate(_hyper(learning_rate=2.0, schedule="constant", warmup_steps=3)) == pytest.approx([0, 2 / 3, 4 / 3] + [2.0] * 8)


def test_schedules_end_well():
    for schedule in SCHEDULES:
        assert all(math.isfinite(r) for r in _rate(_hyper(schedule=schedule, warmup_steps=10)))  # warm-up only
        assert all(math.isfinite(r) for r in _rate(_hyper(schedule=schedule, steps=1), [0, 1, 5]))
    assert _rate(_hyper(), [10, 50]) == [0, 0]


def _reference(values, grads, config, labels, steps):
    """AdamW (arXiv:1711.05101, algorithm 2) with clipping by the global norm, in float64."""
    o = config.optimizer
    x = {k: v.astype(np.float64) for k, v in values.items()}
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.zeros_like(a) for k, a in x.items()}
    for t in range(steps):
        g = {k: a.astype(np.float64) for k, a in grads[t].items()}
        norm = math.sqrt(sum((a**2).sum() for a in g.values()))
        if o.clip_norm is not None and norm > o.clip_norm:
            g = {k: a * o.clip_norm / norm for k, a in g.items()}
        rise = t / o.warmup_steps if t < o.warmup_steps else (steps - t) / (steps - o.warmup_steps)
        for k in x:
            if labels[k] == "frozen":
                continue
            rate = o.learning_rate * rise * {"adapter_b": o.b_lr_ratio, "head": o.head_lr_ratio}.get(labels[k], 1.0)
            m[k] = o.b1 * m[k] + (1 - o.b1) * g[k]
            v[k] = o.b2 * v[k] + (1 - o.b2) * g[k] ** 2
            update = (m[k] / (1 - o.b1 ** (t + 1))) / (np.sqrt(v[k] / (1 - o.b2 ** (t + 1))) + o.eps)
            x[k] = x[k] - rate * (update + o.weight_decay * x[k])
    return x


CASES = [
    {},
    {"weight_decay": 0.3},
    {"clip_norm": 0.5},
    {"b_lr_ratio": 16.0, "head_lr_ratio": 0.25},
    {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "warmup_steps": 5, "weight_decay": 0.1, "clip_norm": 2.0, "b_lr_ratio": 4.0},
]


@pytest.mark.parametrize("values", CASES)
def test_equals_adamw_in_float64(values):
    steps = 15
    config = tiny.config(**{f"optimizer__{k}": v for k, v in values.items()})
    rng = np.random.default_rng(0)
    start = {k: rng.standard_normal((4, 3)).astype(np.float32) for k in LABELS}
    grads = [{k: rng.standard_normal((4, 3)).astype(np.float32) for k in LABELS} for _ in range(steps)]
    optimizer = make_optimizer(hyper_of(config, steps), trained(LABELS))
    state, params = optimizer.init(start), start
    update = jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = {k: params[k] + updates[k] for k in params}
    wanted = _reference(start, grads, config, LABELS, steps)
    for k in LABELS:
        assert tiny.relative(params[k] - start[k], wanted[k] - start[k]) < 2e-5 or LABELS[k] == "frozen"
    np.testing.assert_array_equal(params["base"], start["base"])


def test_frozen_has_no_state():
    start = {"a": jnp.ones((5, 2)), "base": jnp.ones((100, 100))}
    state = make_optimizer(_hyper(), trained({"a": "adapter_a", "base": "frozen"})).init(start)
    assert sum(x.size for x in jax.tree.leaves(state)) < 3 * 10 + 50


def test_a_label_of_a_methods_own_trains_at_the_plain_rate():
    values, labels = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, {"a": "adapter_a", "b": "adapter_b", "c": "own"}
    optimizer = make_optimizer(_hyper(b_lr_ratio=4.0), trained(labels))
    updates, _ = optimizer.update(values, optimizer.init(values), values)
    np.testing.assert_array_equal(updates["c"], updates["a"])
    np.testing.assert_allclose(updates["b"], 4 * updates["a"], rtol=1e-6)


def test_hyperparameters_are_traced():
    """One program serves members that differ in every number and in the schedule."""
    configs = [
        tiny.config(
            optimizer__learning_rate=r, optimizer__schedule=s, optimizer__weight_decay=w, optimizer__warmup_steps=u, optimizer__clip_norm=c
        )
        for r, s, w, u, c in (
            (1e-2, "linear", 0.0, 0, None),
            (1e-3, "cosine", 0.5, 2, 0.1),
            (0.5, "constant", 0.01, 1, 9.0),
            (3e-2, "linear", 0.0, 0, None),
        )
    ]
    traces = []

    @jax.jit
    def first_updates(hyper):
        traces.append(1)
        optimizer = make_optimizer(hyper, trained({"a": "adapter_a"}))
        x = {"a": jnp.full(3, 2.0)}
        state = optimizer.init(x)
        out = []
        for _ in range(3):
            updates, state = optimizer.update({"a": jnp.arange(3.0)}, state, x)
            out.append(updates["a"])
        return jnp.stack(out)

    results = [np.asarray(first_updates(hyper_of(c, 10))) for c in configs]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1]) and not np.allclose(results[0], results[2])
    np.testing.assert_allclose(results[3], 3 * results[0], rtol=1e-5)
    assert not results[1][0].any() and results[0][0].any()  # one warms up from 0, the other does not


def test_norms_and_biases_do_not_decay():
    """Without a gradient only the decay is left: 1 - rate * decay of each weight, and all of a norm or bias."""
    names = {"layers.mlp.up_proj.kernel": "full", "layers.mlp.up_proj.bias": "bias", "layers.attn_norm.scale": "norm"}
    names |= {"classifier.kernel": "head", "classifier.bias": "head", "classifier_norm.scale": "head", "q_proj.lora_a": "adapter_a"}
    hyper = _hyper(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    values = {name: jnp.ones(3) for name in names}
    optimizer = make_optimizer(hyper, trained(names))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, values), optimizer.init(values), values)
    decayed = {name for name in names if float(updates[name][0]) != 0}
    assert decayed == {"layers.mlp.up_proj.kernel", "classifier.kernel", "q_proj.lora_a"}
    np.testing.assert_allclose([updates[name][0] for name in decayed], -0.05, rtol=1e-6)
