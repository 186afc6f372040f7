"""Losses of preferences against float64 transcriptions of their papers' formulas, from summed log-probabilities and from whole batches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.tasks import preference_losses as losses
from lora_jax.tasks.base import objective_of, task_section

RNG = np.random.default_rng(0)
COUNT = 200
# Log-ratios and mean log-probabilities of responses, from even to lost.
RATIO = [(20 * RNG.standard_normal(COUNT) * RNG.random(COUNT) ** 3).astype(np.float32) for _ in range(2)]
MEAN = [(-(10 ** RNG.uniform(-4, 1, COUNT))).astype(np.float32) for _ in range(2)]
W, L = (r.astype(np.float64) for r in RATIO)
MW, ML = (m.astype(np.float64) for m in MEAN)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(mean):
    return np.exp(mean) / (1 - np.exp(mean))


CASES = {
    "dpo": (losses.dpo, RATIO, {"beta": 0.3}, -np.log(sigmoid(0.3 * (W - L)))),
    "cdpo": (
        losses.dpo,
        RATIO,
        {"beta": 0.3, "label_smoothing": 0.2},
        -0.8 * np.log(sigmoid(0.3 * (W - L))) - 0.2 * np.log(sigmoid(-0.3 * (W - L))),
    ),
    "ipo": (losses.ipo, RATIO, {"beta": 0.25}, (W - L - 1 / (2 * 0.25)) ** 2),
    "orpo": (losses.orpo, MEAN, {"weight": 0.4}, -MW - 0.4 * np.log(sigmoid(np.log(odds(MW) / odds(ML))))),
    "simpo": (losses.simpo, MEAN, {"beta": 2.5, "gamma": 1.2}, -np.log(sigmoid(2.5 * MW - 2.5 * ML - 1.2))),
    "reward": (losses.bradley_terry, RATIO, {}, -np.log(sigmoid(W - L))),
}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_papers(name):
    loss, arguments, options, wanted = CASES[name]
    close(loss(*arguments, **options), wanted)
    gradients = jax.grad(lambda *a: loss(*a, **options).sum(), argnums=(0, 1))(*arguments)
    assert all(np.isfinite(g).all() for g in gradients)
    if name not in ("ipo", "cdpo"):  # which may ask for less
        assert (gradients[0] <= 0).all() and (gradients[1] >= 0).all()


def test_kto_is_its_papers():
    desirable = RNG.random(COUNT) < 0.6
    weights = (RNG.random(COUNT) < 0.9).astype(np.float32)
    for shift in (0.0, -50.0):  # the estimate is never negative
        z = max(0.0, (weights * (L + shift)).sum() / weights.sum())
        baseline = losses.kto_baseline(RATIO[1] + np.float32(shift), weights)
        close(baseline, z)
        wanted = np.where(desirable, 1.3 * (1 - sigmoid(0.2 * (W - z))), 0.7 * (1 - sigmoid(0.2 * (z - W))))
        close(losses.kto(RATIO[0], desirable, baseline, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7), wanted)
    assert not np.asarray(jax.grad(lambda r: losses.kto_baseline(r, jnp.asarray(weights)))(RATIO[1])).any()


def test_a_certain_response_has_finite_odds():
    value, gradient = jax.value_and_grad(lambda m: losses.orpo(m, jnp.float32(-1.0), weight=1.0))(jnp.float32(0.0))
    assert np.isfinite(value) and np.isfinite(gradient)


def test_drift_is_never_negative_and_0_where_nothing_moved():
    x = np.linspace(-3, 3, 61, dtype=np.float32)
    close(losses.drift(x), np.exp(-x.astype(np.float64)) - 1 + x)
    assert (np.asarray(losses.drift(x)) >= 0).all() and losses.drift(jnp.float32(0)) == 0


# A micro-batch of 5 examples, the last of which is filler, and 40 targets, the last 6 of which are; a readout of 9 words.
EXAMPLES, TARGETS, WORDS = 5, 40, 9
FEATURES = RNG.standard_normal((TARGETS, 6)).astype(np.float32)
MATRIX = RNG.standard_normal((6, WORDS)).astype(np.float32)


class Readout:
    def readout(self):
        return lambda x: x @ MATRIX


def batch_of(roles, *, present=None):
    """Targets in a random order; `present` says which roles an example has."""
    there = [(e, r) for e in range(EXAMPLES - 1) for r in (range(roles) if present is None else present[e])]
    owner = np.array([there[i % len(there)] for i in RNG.permutation(TARGETS - 6)] + [(0, 0)] * 6, np.int32)
    arrays = {
        "target_ids": RNG.integers(0, WORDS, TARGETS).astype(np.int32),
        "target_weights": (np.arange(TARGETS) < TARGETS - 6).astype(np.float32),
        "target_examples": owner[:, 0],
        "target_roles": owner[:, 1],
        "example_weights": (np.arange(EXAMPLES) < EXAMPLES - 1).astype(np.float32),
        losses.REFERENCE: (-2 + 0.3 * RNG.standard_normal(TARGETS)).astype(np.float32),
    }
    return {name: jnp.asarray(a) for name, a in arrays.items()}


def sums_of(batch, roles):
    """(examples, roles) float64: summed log-probabilities, the base's, and counts."""
    logits = FEATURES.astype(np.float64) @ MATRIX
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.zeros((3, EXAMPLES, roles))
    for i in range(TARGETS - 6):
        values = (logp[i, batch["target_ids"][i]], batch[losses.REFERENCE][i], 1)
        found[:, batch["target_examples"][i], batch["target_roles"][i]] += values
    return found[:, :-1]


@pytest.mark.parametrize(("name", "per_token"), [("dpo", False), ("ipo", True), ("simpo", False), ("orpo", False)])
def test_an_objective_of_pairs(name, per_token):
    batch = batch_of(2)
    values = {"per_token": per_token} if name in ("dpo", "ipo") else {}
    section = task_section(kind="preference", source="a", prompt="p", chosen="c", rejected="r", loss=name, **values)
    objective = objective_of(section)
    loss, right, means = objective(Readout(), FEATURES, batch)
    logp, reference, count = sums_of(batch, 2)
    ratio = (logp - reference) / (count if per_token else 1)
    mean = logp / count
    wanted, rewards = {
        "dpo": lambda: (-np.log(sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1]))), 0.1 * ratio),
        "ipo": lambda: ((ratio[:, 0] - ratio[:, 1] - 5) ** 2, 0.1 * ratio),
        "simpo": lambda: (-np.log(sigmoid(2 * (mean[:, 0] - mean[:, 1]) - 1)), 2 * mean),
        "orpo": lambda: (-mean[:, 0] - 0.1 * np.log(sigmoid(np.log(odds(mean[:, 0]) / odds(mean[:, 1])))), mean),
    }[name]()
    np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
    assert right == (rewards[:, 0] > rewards[:, 1]).sum()
    quotients = {key: float(a / b) for key, (a, b) in means.items()}
    assert quotients["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4)
    assert quotients["chosen_reward"] == pytest.approx(rewards[:, 0].mean(), rel=1e-4)
    assert quotients["rejected_reward"] == pytest.approx(rewards[:, 1].mean(), rel=1e-4)
    gradient = jax.grad(lambda x: objective(Readout(), x, batch)[0])(FEATURES)
    assert not np.asarray(gradient)[-6:].any() and np.asarray(gradient)[:-6].any(1).all()


def test_the_objective_of_kto():
    present = [(0, 2), (1, 2), (1, 2), (0, 2)]
    batch = batch_of(3, present=present)
    objective = functools.partial(losses.kto_objective, beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
    loss, right, means = objective(Readout(), FEATURES, batch)
    logp, reference, _ = sums_of(batch, 3)
    ratio = logp - reference
    z = max(0.0, ratio[:, 2].mean())
    good = np.array([p[0] == 0 for p in present])
    own = np.where(good, ratio[:, 0], ratio[:, 1])
    wanted = np.where(good, 1.5 * (1 - sigmoid(0.5 * (own - z))), 0.5 * (1 - sigmoid(0.5 * (z - own))))
    np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
    assert right == np.where(good, own > z, own < z).sum()
    for name, side in (("chosen_reward", good), ("rejected_reward", ~good)):
        assert float(means[name][0] / means[name][1]) == pytest.approx(0.5 * own[side].mean(), rel=1e-4)
    # No gradient goes through the baseline: the unrelated responses get none.
    gradient = np.asarray(jax.grad(lambda x: objective(Readout(), x, batch)[0])(FEATURES))
    assert not gradient[np.asarray(batch["target_roles"]) == 2].any()


def test_the_objective_of_a_reward_head():
    owner = np.array([(e, r) for e in range(4) for r in range(2)] + [(0, 0)] * 2, np.int32)
    order = RNG.permutation(8)
    owner[:8] = owner[order]
    batch = {
        "target_weights": jnp.asarray([1.0] * 8 + [0.0] * 2),
        "target_examples": jnp.asarray(owner[:, 0]),
        "target_roles": jnp.asarray(owner[:, 1]),
        "example_weights": jnp.asarray([1.0, 1, 1, 1, 0]),
    }
    scores = RNG.standard_normal((10, 1)).astype(np.float32)
    model = type("Scores", (), {"readout": lambda self: lambda x: x})()
    loss, right, means = losses.reward_objective(model, jnp.asarray(scores), batch)
    table = np.zeros((4, 2))
    for (e, r), s in zip(owner[:8], scores[:8, 0], strict=True):
        table[e, r] = s
    np.testing.assert_allclose(loss, -np.log(sigmoid(table[:, 0] - table[:, 1])).sum(), rtol=1e-5)
    assert right == (table[:, 0] > table[:, 1]).sum()
    assert float(means["margin"][0] / means["margin"][1]) == pytest.approx((table[:, 0] - table[:, 1]).mean(), rel=1e-4)
