"""The training loop: batches through the compiled step, evaluations in between, and the outcome of each member.

Also traces a few steps for TensorBoard's profiler.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.partition import Arrays
from ..errors import Stopped
from ..parallel.mesh import to_host
from ..tasks.evaluators import EVALUATORS, Evaluator
from .checkpoint import PackCheckpoints, Saved
from .evaluation import Pack, Tested, evaluate_pack, test_pack
from .setup import Setup
from .step import Metrics
from .trunk import Trunk


class Listener(Protocol):
    """Receives a pack's progress. Every array is (members,) float32 on the host; a task's tables are (members, ...)."""

    def on_start(self, step: int) -> None:
        """Training starts or resumes after `step` steps."""

    def on_save(self, step: int) -> None:
        """A checkpoint at `step` is about to be written. A resumed run will not repeat the calls before it."""

    def on_train(self, step: int, metrics: dict[str, np.ndarray], tokens_per_second: float) -> None:
        """Means of `loss`, `accuracy` and what else the objective says since the last call, and `grad_norm` and `learning_rate`, after
        `step` steps."""

    def on_eval(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """`loss` and the task's metrics on the held-out examples, as `evaluate_pack` gives them."""

    def on_texts(self, step: int, texts: list[list[str]]) -> None:
        """What each member generated in that evaluation, where the task is evaluated by texts: one for each of `Examples.prompts`."""

    def on_pictures(self, step: int, pictures: list[bytes]) -> None:
        """A PNG of each member's answers in that evaluation, where its examples can be shown (`Examples.picture`)."""


@dataclasses.dataclass
class Outcome:
    """The outcome of a pack.

    Attributes:
        final, best: metrics of the last and the best evaluation, (members,) arrays; best by `TaskMetrics.selection`.
        best_step: (members,) int.
        steps: number of steps done.
        alive: (members,) bool; False where a loss was not finite.
        final_arrays, best_arrays: trainable arrays, stacked, as they are evaluated.
        test: what the members scored on the test rows; None where there are none, or training is to go on.
        train: what was last logged of training steps, (members,) arrays: means over `log_every` steps, or the last few.
        tokens: number of tokens that one member trained on, without padding.
        tokens_per_second: of one member, without the first step (which compiles) and evaluations; 0 if there was only one step.
        total_seconds: including compilation and evaluation.
    """

    final: dict[str, np.ndarray]
    best: dict[str, np.ndarray]
    best_step: np.ndarray
    steps: int
    alive: np.ndarray
    final_arrays: Arrays
    best_arrays: Arrays
    tokens: int
    tokens_per_second: float
    total_seconds: float
    test: Tested | None = None
    train: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def train_pack(
    pack: Pack,
    setup: Setup,
    *,
    eval_every: int,
    log_every: int,
    listener: Listener,
    checkpoints: PackCheckpoints | None = None,
    checkpoint_every: int = 0,
    stop: Callable[[int], bool] = lambda step: False,
    trace: StepTrace | None = None,
    until: int | None = None,
    start: Callable[[], Saved | None] | None = None,
    trunk: Trunk | None = None,
) -> Outcome:
    """Trains all members of a pack to the last step, starting from its newest checkpoint if there is one.

    Args:
        pack: members at step 0; its state is consumed.
        setup: data and number of steps.
        eval_every: steps between evaluations; with 0, only the last step is evaluated.
        log_every: steps between calls of `listener.on_train`.
        listener: receives the progress.
        checkpoints: the pack's checkpoints; if None, nothing is saved or resumed.
        checkpoint_every: steps between checkpoints; with 0, there is only one at the end.
        stop: called after each step with the number of steps done; True stops there.
        trace: traces a few steps for the profiler.
        until: the step to end at; the setup's last by default.
        start: returns what to start from if there is no checkpoint; step 0 by default, or if it returns None.
        trunk: computes the layers that the members share; without it the step computes them too.

    Raises:
        Stopped: `stop` returned True; everything up to that step is in a checkpoint.
        RunError: a program was compiled more than once.
    """
    state, frozen = pack.state, pack.part.frozen
    began = time.perf_counter()
    best = _Best(len(pack.configs), EVALUATORS.get(setup.metrics.selection, "task.kind"))
    window: list[dict[str, np.ndarray]] = []
    fresh: list[Metrics] = []  # of steps that may still be under way
    clock = _Clock()
    final: dict[str, np.ndarray] = {}
    logged: dict[str, np.ndarray] = {}
    first = 0
    last = setup.steps if until is None else until
    saved = checkpoints.restore(state, pack.kept) if checkpoints is not None else None
    if saved is None and start is not None:
        saved = start()
        if saved is not None and checkpoints is not None and saved.best is not None:
            checkpoints.save_best(saved.step, saved.best)  # these checkpoints do not have it yet
    if saved is not None:
        first, state = saved.step, saved.state
        pack.keep(saved.kept)
        best.load(saved.loop["best"], saved.best)
        window = [{n: np.array(v, np.float32) for n, v in row.items()} for row in saved.loop["window"]]
        final = {n: np.array(v) for n, v in saved.loop["final"].items()}
        logged = {n: np.array(v) for n, v in saved.loop.get("train", {}).items()}  # older checkpoints lack it
        clock.total_tokens, began = saved.loop["tokens"], began - saved.loop["seconds"]
    listener.on_start(first)
    fixed = pack.fixed

    def save(done: int) -> None:
        assert checkpoints is not None
        window.extend(_on_host(fresh))
        fresh.clear()
        loop = {
            "best": best.dump(),
            "window": [{n: v.tolist() for n, v in row.items()} for row in window],
            "final": {n: v.tolist() for n, v in final.items()},
            "train": {n: v.tolist() for n, v in logged.items()},
            "tokens": clock.total_tokens,
            "seconds": time.perf_counter() - began,
        }
        listener.on_save(done)
        checkpoints.save(done, state, loop, pack.kept)

    for step, batch in enumerate(setup.plan.batches(first, last), first):
        state, metrics = pack.programs.train(state, fixed, frozen, setup.step_inputs(step, batch, trunk), np.int32(step))
        fresh.append(metrics)
        done = step + 1
        if trace is not None:
            trace.after_step(metrics)
        clock.count(sum(int((batch[name] > 0).sum()) for name in ("segment_ids", "decoder_segment_ids") if name in batch))
        if done == first + 1:
            jax.block_until_ready(metrics)  # the first step compiles; its time is no measure of the rest
            clock.restart()
        if done % log_every == 0 or done == setup.steps:
            logged = _window_means(window + _on_host(fresh))
            window.clear()
            fresh.clear()
            listener.on_train(done, logged, clock.rate())
        if done == last or (eval_every and done % eval_every == 0):
            jax.block_until_ready(metrics)  # steps still under way are training, not evaluation
            clock.pause()
            arrays = pack.eval_params(state)
            texts: list[list[str]] = []
            pictures: list[bytes] = []
            final = evaluate_pack(pack, setup, arrays, trunk=trunk, texts=texts, pictures=pictures)
            if best.offer(done, final, arrays) and checkpoints is not None and best.arrays is not None:
                checkpoints.save_best(done, best.arrays)
            listener.on_eval(done, final)
            if texts:
                listener.on_texts(done, texts)
            if pictures:
                listener.on_pictures(done, pictures)
            clock.resume()
        if checkpoints is not None:
            stopping = done < last and stop(done)
            if stopping or done == last or (checkpoint_every and done % checkpoint_every == 0):
                clock.pause()
                save(done)
                clock.resume()
            if stopping:
                checkpoints.wait()
                raise Stopped(done)
    if trace is not None:
        trace.close(state)
    pack.programs.check()
    if checkpoints is not None:
        checkpoints.wait()
    assert best.arrays is not None
    tested = None
    if setup.data.test is not None and last >= setup.steps:
        tested = test_pack(pack, setup, setup.data.test, pack.eval_params(state), best.arrays, trunk)
        pack.programs.check()
    return Outcome(
        final,
        best.metrics,
        best.step,
        max(first, last),
        to_host(state.alive),
        pack.eval_params(state),
        best.arrays,
        clock.total_tokens,
        clock.mean_rate,
        time.perf_counter() - began,
        tested,
        logged,
    )


def _on_host(metrics: Sequence[Metrics]) -> list[dict[str, np.ndarray]]:
    named = [{**{name: value for name, value in m._asdict().items() if name != "means"}, **m.means} for m in metrics]
    return [{name: np.asarray(value) for name, value in one.items()} for one in named]


def _window_means(window: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    stacked = {name: np.stack([row[name] for row in window]) for name in window[0]}
    # These two are states, not samples: the newest value counts. What else the objective says, a step may have nothing of.
    state, own = ("grad_norm", "learning_rate"), Metrics._fields
    return {n: a[-1] if n in state else a.mean(0) if n in own else _mean_of_known(a) for n, a in stacked.items()}


def _mean_of_known(rows: np.ndarray) -> np.ndarray:
    """(members,): the mean over the rows that are not NaN; NaN where all are."""
    known = ~np.isnan(rows)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, rows, 0).sum(0) / np.maximum(count, 1), np.nan).astype(np.float32)


class _Best:
    """The best evaluation of each member so far, with its arrays."""

    def __init__(self, members: int, evaluator: Evaluator):
        self.evaluator = evaluator
        self.score = np.full(members, -np.inf)
        self.step = np.zeros(members, int)
        self.metrics: dict[str, np.ndarray] = {}
        self.arrays: Arrays | None = None

    def dump(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        return {"score": self.score.tolist(), "step": self.step.tolist(), "metrics": {n: v.tolist() for n, v in self.metrics.items()}}

    def load(self, dumped: dict[str, Any], arrays: Arrays | None) -> None:
        """Restores what `dump` returned, and the arrays."""
        self.score, self.step = np.array(dumped["score"]), np.array(dumped["step"])
        self.metrics = {n: np.array(v) for n, v in dumped["metrics"].items()}
        self.arrays = arrays

    def offer(self, step: int, metrics: dict[str, np.ndarray], arrays: Arrays) -> bool:
        """Keeps each member's arrays and metrics if they are better than before; returns whether any were."""
        score = self.evaluator.sign * metrics[self.evaluator.name]
        better = score > self.score  # never true of NaN
        if self.arrays is None:
            # A copy: the step donates its state, and with it these buffers.
            self.arrays = jax.tree.map(jnp.copy, arrays)
            self.metrics = {name: values.copy() for name, values in metrics.items()}
        else:
            shaped = {n: jnp.asarray(better).reshape(-1, *([1] * (a.ndim - 1))) for n, a in arrays.items()}
            self.arrays = {n: jnp.where(shaped[n], a, self.arrays[n]) for n, a in arrays.items()}
            for name, values in metrics.items():
                # Unknown where the best was found by an older version, which did not compute it.
                before = self.metrics.get(name, np.full_like(values, np.nan))
                self.metrics[name] = np.where(better.reshape(-1, *([1] * (values.ndim - 1))), values, before)
        self.score = np.where(better, score, self.score)
        changed = better | (self.step == 0)
        self.step = np.where(changed, step, self.step)
        return bool(changed.any())


class _Clock:
    """Time and tokens of training, without compilation and evaluation."""

    def __init__(self) -> None:
        self.seconds, self.total_tokens, self._tokens = 0.0, 0, 0
        self._since = time.perf_counter()
        self._mark: tuple[float, int] = (0.0, 0)

    def count(self, tokens: int) -> None:
        self.total_tokens += tokens
        self._tokens += tokens

    def restart(self) -> None:
        self._since, self._tokens, self.seconds, self._mark = time.perf_counter(), 0, 0.0, (0.0, 0)

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    @property
    def mean_rate(self) -> float:
        """Tokens per second since the restart; read it while the clock is paused."""
        return self._tokens / self.seconds if self._tokens and self.seconds > 0 else 0.0

    def rate(self) -> float:
        """Tokens per second since the last call."""
        self.pause()
        self.resume()
        seconds, tokens = self.seconds - self._mark[0], self._tokens - self._mark[1]
        self._mark = (self.seconds, self._tokens)
        return tokens / seconds if seconds > 0 and tokens else 0.0


class StepTrace:
    """Traces `steps` steps after two that compile and warm up. `tensorboard --logdir RUN` shows them with tensorboard-plugin-profile.

    Args:
        folder: the trace is written here.
        steps: number of steps; 0 traces nothing.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._seen, self._open = 0, False

    def after_step(self, result: object) -> None:
        """Called after each step with its results, which may still be being computed."""
        self._seen += 1
        if self._steps and self._seen == 2:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif self._open and self._seen == 2 + self._steps:
            self.close(result)

    def close(self, result: object) -> None:
        """Ends the trace if it is still open, as it is after a short run."""
        if self._open:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._open = False
