"""Losses of preferences between responses to a prompt: pure functions of a number or two for each response, and what makes those numbers.

`ratio` below is log pi(y|x) - log pi_ref(y|x) of a response, `mean` its log pi(y|x) divided by its tokens, `score` a reward head's output;
all are (examples,) float32. Each loss is (examples,) float32, not yet summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models.heads import TaskModel
from .objectives import Means, target_log_probs

# The base's log-probability of each target, in a batch.
REFERENCE = "target_reference"
# The roles of responses (`Example.parts`): of a pair, or the one that an example without a pair has; and one that answers another prompt.
CHOSEN, REJECTED, UNRELATED = 0, 1, 2
# Mean log-probabilities above this count as this: the odds of a certain response are infinite.
_SURE = -1e-6


def dpo(chosen_ratio: jax.Array, rejected_ratio: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO (arXiv:2305.18290, eq. 7): -log sigmoid(beta (ratio_w - ratio_l)).

    With `label_smoothing` e, conservative DPO (E. Mitchell, "A note on DPO with noisy preferences", 2023), where a preference is
    taken to be the wrong way round with probability e: (1 - e) times the loss plus e times that of the swapped pair.
    """
    logits = beta * (chosen_ratio - rejected_ratio)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def ipo(chosen_ratio: jax.Array, rejected_ratio: jax.Array, *, beta: float) -> jax.Array:
    """IPO (arXiv:2310.12036, eq. 17): (ratio_w - ratio_l - 1 / (2 beta))^2; beta is the paper's tau."""
    return jnp.square(chosen_ratio - rejected_ratio - 1 / (2 * beta))


def orpo(chosen_mean: jax.Array, rejected_mean: jax.Array, *, weight: float) -> jax.Array:
    """ORPO (arXiv:2403.07691, eq. 6 and 7): -mean_w - weight log sigmoid(log odds_w - log odds_l), odds = P / (1 - P), P = exp(mean).

    The first term is the loss of a language model on the chosen response; `weight` is the paper's lambda.
    """

    def log_odds(mean: jax.Array) -> jax.Array:
        mean = jnp.minimum(mean, _SURE)
        # log(1 - exp(mean)), each form where it is exact.
        rest = jnp.where(mean > -0.6931472, jnp.log(-jnp.expm1(mean)), jnp.log1p(-jnp.exp(mean)))
        return mean - rest

    return -chosen_mean - weight * jax.nn.log_sigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def simpo(chosen_mean: jax.Array, rejected_mean: jax.Array, *, beta: float, gamma: float) -> jax.Array:
    """SimPO (arXiv:2405.14734, eq. 6): -log sigmoid(beta mean_w - beta mean_l - gamma)."""
    return -jax.nn.log_sigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def kto(
    ratio: jax.Array, desirable: jax.Array, baseline: jax.Array, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> jax.Array:
    """KTO (arXiv:2402.01306, eq. 7): w_D (1 - sigmoid(beta (ratio - z))) of a desirable response, w_U (1 - sigmoid(beta (z - ratio)))
    of an undesirable one.

    Args:
        ratio: of the responses.
        desirable: (examples,) bool.
        baseline: z, a scalar (`kto_baseline`).
    """
    side = jnp.where(desirable, 1.0, -1.0)
    return jnp.where(desirable, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-side * beta * (ratio - baseline))


def kto_baseline(unrelated_ratio: jax.Array, weights: jax.Array) -> jax.Array:
    """KTO's estimate of the divergence from the reference (arXiv:2402.01306, section 4.1), max(0, mean ratio) of responses that answer
    other prompts.

    Args:
        unrelated_ratio: (examples,).
        weights: (examples,), 0 of filler.

    Returns:
        a scalar through which no gradient goes.
    """
    mean = jnp.sum(weights * unrelated_ratio) / jnp.maximum(jnp.sum(weights), 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def bradley_terry(chosen_score: jax.Array, rejected_score: jax.Array) -> jax.Array:
    """A reward model's loss (Bradley and Terry, 1952; arXiv:2203.02155, eq. 1): -log sigmoid(score_w - score_l)."""
    return -jax.nn.log_sigmoid(chosen_score - rejected_score)


def drift(ratio: jax.Array) -> jax.Array:
    """exp(-ratio) - 1 + ratio of single tokens: an estimate of the divergence from the reference that is never negative ("k3" of
    J. Schulman, "Approximating KL divergence", 2020). Its mean is KL(pi, pi_ref) where the tokens are drawn from pi, which those of a data
    set are not: a measure of how far the model has moved on these responses."""
    return jnp.expm1(-ratio) + ratio


class Responses(NamedTuple):
    """What is known of the responses of a micro-batch, (examples, roles) float32 each; 0 where an example has no such response.

    Attributes:
        ratio: log pi(y|x) - log pi_ref(y|x); 0 without a reference.
        log_prob: log pi(y|x).
        tokens: how many it has.
        weights: (examples,), 0 of filler.
        drift: (sum, number) over the tokens of the examples' own responses.
    """

    ratio: jax.Array
    log_prob: jax.Array
    tokens: jax.Array
    weights: jax.Array
    drift: tuple[jax.Array, jax.Array]

    @property
    def mean(self) -> jax.Array:
        """log pi(y|x) of a token, (examples, roles)."""
        return self.log_prob / jnp.maximum(self.tokens, 1.0)

    @property
    def mean_ratio(self) -> jax.Array:
        """The ratio of a token, (examples, roles)."""
        return self.ratio / jnp.maximum(self.tokens, 1.0)


def of_roles(batch: dict[str, jax.Array], values: jax.Array, roles: int) -> jax.Array:
    """Numbers of a micro-batch's targets, (columns, targets) float32, summed over each response: (columns, examples, roles)."""
    examples = batch["example_weights"].shape[0]
    # A product with ones and zeros in place of a scatter: its sums have one order on every device.
    owner = jax.nn.one_hot(batch["target_examples"] * roles + batch["target_roles"], examples * roles, dtype=jnp.float32)
    values = jnp.where(batch["target_weights"] > 0, values, 0.0)
    return jnp.matmul(values, owner, precision=jax.lax.Precision.HIGHEST).reshape(-1, examples, roles)


def responses(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array], roles: int) -> Responses:
    """The responses of a micro-batch, from a language model's features.

    Args:
        roles: how many there are.
    """
    log_prob = target_log_probs(model.readout(), features, batch["target_ids"])
    # Summed token by token: two large sums would differ by less than their rounding.
    ratio = log_prob - batch[REFERENCE] if REFERENCE in batch else jnp.zeros_like(log_prob)
    real = batch["target_weights"]
    sums = of_roles(batch, jnp.stack([ratio, log_prob, jnp.ones_like(log_prob)]), roles)
    own = real * (batch["target_roles"] != UNRELATED)
    moved = jnp.sum(jnp.where(own > 0, drift(ratio), 0.0)), jnp.sum(own)
    return Responses(sums[0], sums[1], sums[2], batch["example_weights"], moved)


# Of a micro-batch: the loss of each example, and the reward of each response.
PairLoss = Callable[[Responses], tuple[jax.Array, jax.Array]]


def of_pairs(weights: jax.Array, losses: jax.Array, rewards: jax.Array) -> tuple[jax.Array, jax.Array, Means]:
    """What an objective returns of pairs: a pair is right where the chosen response has the larger reward.

    Args:
        weights, losses: (examples,).
        rewards: (examples, 2).
    """
    chosen, rejected = rewards[:, CHOSEN], rewards[:, REJECTED]
    count = weights.sum()
    means = {
        "margin": (jnp.sum(weights * (chosen - rejected)), count),
        "chosen_reward": (jnp.sum(weights * chosen), count),
        "rejected_reward": (jnp.sum(weights * rejected), count),
    }
    return jnp.sum(weights * losses), jnp.sum(weights * (chosen > rejected)), means


def pair_objective(loss: PairLoss, model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> Any:
    """The objective of a loss of pairs over a language model."""
    found = responses(model, features, batch, 2)
    total, right, means = of_pairs(found.weights, *loss(found))
    return total, right, means | ({"kl": found.drift} if REFERENCE in batch else {})


def kto_objective(
    model: TaskModel,
    features: jax.Array,
    batch: dict[str, jax.Array],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Any:
    """KTO's objective. An example has one response, in the role of its label, and an unrelated one for the baseline, which is that of the
    micro-batch. It is right where its ratio is on its label's side of the baseline."""
    found = responses(model, features, batch, 3)
    weights, desirable = found.weights, found.tokens[:, CHOSEN] > 0
    baseline = kto_baseline(found.ratio[:, UNRELATED], weights)
    ratio = found.ratio[:, CHOSEN] + found.ratio[:, REJECTED]  # of which one is 0
    losses = kto(ratio, desirable, baseline, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    right = jnp.where(desirable, ratio > baseline, ratio < baseline)
    means = {"kl": found.drift}
    for name, of in (("chosen_reward", weights * desirable), ("rejected_reward", weights * ~desirable)):
        means[name] = (jnp.sum(of * beta * ratio), jnp.sum(of))
    return jnp.sum(weights * losses), jnp.sum(weights * right), means


def reward_objective(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> Any:
    """The objective of a reward head: a score for each response, at its one target."""
    scores = of_roles(batch, model.readout()(features)[:, 0].astype(jnp.float32)[None], 2)[0]
    return of_pairs(batch["example_weights"], bradley_terry(scores[:, CHOSEN], scores[:, REJECTED]), scores)
