"""The loop without a model: what it counts, keeps and reports of steps and evaluations that are given to it."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data.batching import Examples
from lora_jax.tasks.base import TaskMetrics
from lora_jax.tasks.evaluators import LOSS, perplexity
from lora_jax.training.evaluation import evaluate_pack
from lora_jax.training.loop import _Best, _Clock, train_pack
from lora_jax.training.step import MemberState, Metrics

DATA = types.SimpleNamespace(held_out=Examples([], []), test=None)
OTHERS = Examples([], [])


class Programs:
    """Stands for compiled programs: a step adds 1 to the arrays of members that live; the second member dies at step 4."""

    def __init__(self, dies=None):
        self.checked, self.steps, self.dies = False, [], dies

    def train(self, state, fixed, frozen, batch, step):
        self.steps.append(int(step))
        alive = state.alive & np.array([True, self.dies is None or step < self.dies])
        loss = jnp.where(alive, 1.0 + step, jnp.nan)
        return MemberState({"w": state.trainable["w"] + alive[:, None]}, None, alive), Metrics(
            loss, loss / 10, loss * 2, jnp.full(2, 0.5 - step)
        )

    def evaluate(self, trainable, settings, frozen, batch):
        # The first member is best at step 4, the second at the first evaluation.
        w = trainable["w"][:, 0]
        count = batch["target_weights"].sum()
        return count * w, count * jnp.stack([-jnp.abs(w[0] - 4), -w[1]]), {"lead": (2 * count * w, count)}, None

    def check(self):
        self.checked = True


class Plan:
    def __init__(self, tokens=5):
        self.segments = np.ones((1, 1, tokens), np.int32)

    def batches(self, start, stop):
        return iter([{"segment_ids": self.segments}] * (stop - start))

    def eval_batches(self, examples):
        if examples is OTHERS:
            return [{"target_weights": np.array([0.0, 2.0])}]
        return [{"target_weights": np.ones(3)}, {"target_weights": np.array([1.0, 0.0, 0.0])}]


class Listener:
    def __init__(self):
        self.train, self.eval = {}, {}

    def on_start(self, step):
        self.started = step

    def on_train(self, step, metrics, tokens_per_second):
        self.train[step] = metrics | {"tps": tokens_per_second}

    def on_eval(self, step, metrics):
        self.eval[step] = metrics


METRICS = {
    "accuracy": TaskMetrics(("loss", "accuracy"), "accuracy"),
    "loss": TaskMetrics(("loss", "perplexity", "token_accuracy"), "loss", "perplexity"),
}


def setup_of(metric, **values):
    inputs = {"step_inputs": lambda step, batch, trunk: batch, "held_out_inputs": lambda batch, trunk: batch}
    return types.SimpleNamespace(plan=Plan(), data=DATA, metrics=METRICS[metric], **inputs, **values)


def run(steps, *, eval_every, log_every, metric="accuracy", dies=None):
    state = MemberState({"w": jnp.zeros((2, 3))}, None, jnp.array([True, True]))
    pack = types.SimpleNamespace(
        state=state,
        fixed=types.SimpleNamespace(settings={}),
        part=types.SimpleNamespace(frozen={}),
        configs=[0, 1],
        programs=Programs(dies),
        eval_params=lambda state: state.trainable,
    )
    setup = setup_of(metric, steps=steps)
    listener = Listener()
    outcome = train_pack(pack, setup, eval_every=eval_every, log_every=log_every, listener=listener)
    assert pack.programs.checked and pack.programs.steps == list(range(steps))
    return outcome, listener


def test_what_is_logged_are_means_since_the_last_time():
    _, heard = run(7, eval_every=0, log_every=3)
    assert list(heard.train) == [3, 6, 7]
    assert heard.train[3]["loss"].tolist() == [2.0, 2.0] and heard.train[6]["loss"].tolist() == [5.0, 5.0]
    assert heard.train[6]["accuracy"] == pytest.approx([0.5, 0.5])
    # A gradient norm and a learning rate are states: the newest counts.
    assert heard.train[6]["grad_norm"].tolist() == [12.0, 12.0] and heard.train[6]["learning_rate"].tolist() == [-4.5, -4.5]
    assert list(heard.eval) == [7]


@pytest.mark.parametrize(("steps", "every", "expected"), [(7, 0, [7]), (7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 5, [2])])
def test_when_it_evaluates(steps, every, expected):
    assert list(run(steps, eval_every=every, log_every=10)[1].eval) == expected


def test_final_and_best_are_kept_apart():
    outcome, _ = run(8, eval_every=2, log_every=10)
    assert outcome.best_step.tolist() == [4, 2]
    assert outcome.best["accuracy"].tolist() == [0.0, -2.0] and outcome.best["loss"].tolist() == [4.0, 2.0]
    assert outcome.final["loss"].tolist() == [8.0, 8.0]
    assert outcome.best_arrays["w"][:, 0].tolist() == [4.0, 2.0] and outcome.final_arrays["w"][:, 0].tolist() == [8.0, 8.0]


def test_a_loss_is_best_where_it_is_lowest():
    outcome, heard = run(8, eval_every=2, log_every=10, metric="loss")
    assert outcome.best_step.tolist() == [2, 2]
    assert set(heard.eval[2]) == {"loss", "perplexity", "token_accuracy"}
    assert heard.eval[2]["perplexity"] == pytest.approx(np.exp([2.0, 2.0]), rel=1e-6)


def test_who_is_still_alive():
    outcome, heard = run(8, eval_every=4, log_every=8, dies=5)
    assert outcome.alive.tolist() == [True, False]
    assert outcome.final_arrays["w"][:, 0].tolist() == [8.0, 5.0]
    assert np.isnan(heard.train[8]["loss"][1]) and heard.train[8]["loss"][0] == 4.5


def test_tokens_are_counted_without_the_compiling_step():
    outcome, heard = run(6, eval_every=2, log_every=2)
    assert outcome.tokens == 30 and outcome.tokens_per_second > 0
    assert all(row["tps"] > 0 for row in heard.train.values())
    # One step alone is the one that compiles: there is nothing to say about speed.
    alone, _ = run(1, eval_every=0, log_every=1)
    assert alone.tokens == 5 and alone.tokens_per_second == 0.0


def test_evaluation_weighs_labels_not_batches():
    pack = types.SimpleNamespace(
        programs=Programs(), fixed=types.SimpleNamespace(settings={}), part=types.SimpleNamespace(frozen={}), configs=[0, 1]
    )
    setup = setup_of("accuracy")
    assert evaluate_pack(pack, setup, {"w": jnp.full((2, 3), 3.0)})["loss"].tolist() == [3.0, 3.0]
    assert evaluate_pack(pack, setup, {"w": jnp.full((2, 3), 3.0)}, OTHERS)["accuracy"].tolist() == [-1.0, -3.0]


def test_nan_is_never_best():
    best = _Best(2, LOSS)
    for step, losses in ((1, [np.nan, 3.0]), (2, [2.0, np.nan]), (3, [np.nan, np.nan])):
        best.offer(step, {"loss": np.array(losses)}, {"w": jnp.full((2, 1), float(step))})
    assert best.step.tolist() == [2, 1] and best.metrics["loss"].tolist() == [2.0, 3.0] and best.arrays["w"][:, 0].tolist() == [2.0, 1.0]


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lora_jax.training.loop.time.perf_counter", lambda: now[0])
    clock = _Clock()

    def spend(seconds, tokens=0):
        clock.count(tokens)
        now[0] += seconds

    spend(100, tokens=7)  # compilation
    clock.restart()
    spend(2, tokens=10)
    assert clock.rate() == 5.0
    clock.pause()
    spend(50)  # evaluation
    clock.resume()
    spend(2, tokens=30)
    assert clock.rate() == 15.0
    assert clock.mean_rate == 10.0 and clock.total_tokens == 47


def test_a_perplexity_beyond_all_numbers_is_infinite(recwarn):
    assert perplexity(np.float32([0, 1000, np.nan])).tolist() == pytest.approx([1, np.inf, np.nan], nan_ok=True)
    assert not recwarn.list
