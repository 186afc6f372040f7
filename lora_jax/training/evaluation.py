"""Evaluation: every member of a pack on the held-out rows, and once, when they have ended, on the test rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from ..adapters.methods.base import method_of
from ..adapters.partition import Arrays, Partition
from ..config.schema import Config
from ..data.batching import Examples
from ..data.prompts import Prompts
from ..errors import RunError
from ..generation.generate import decode_prompts
from ..parallel.mesh import to_host
from ..tasks.evaluators import EVALUATORS, Evaluator
from ..tasks.objectives import Means, total_weight
from .setup import Setup
from .step import MemberFixed, MemberState
from .trunk import Trunk


class Pack(Protocol):
    """What the loop needs of a pack (`packing/pack.py`): members stacked on a leading axis, and the compiled programs that run them."""

    configs: Sequence[Config]
    part: Partition
    state: MemberState
    fixed: MemberFixed
    programs: Any

    @property
    def kept(self) -> Arrays:
        """The members' own arrays that do not train."""
        ...

    def keep(self, kept: Arrays) -> None:
        """Puts others in their place."""

    def eval_params(self, state: MemberState) -> Arrays:
        """What the members are evaluated and saved with."""
        ...


def evaluate_pack(
    pack: Pack,
    setup: Setup,
    trainable: Arrays,
    examples: Examples | None = None,
    *,
    trunk: Trunk | None = None,
    sums: list[tuple[float, np.ndarray, np.ndarray]] | None = None,
    texts: list[list[str]] | None = None,
    pictures: list[bytes] | None = None,
) -> dict[str, np.ndarray]:
    """Every member's metrics (`TaskMetrics.held_out`) on the held-out examples, or on `examples`: name -> (members,) array.

    The task's tables (`TaskMetrics.tables`) come with them, (members, ...) each.

    Args:
        pack: the members.
        setup: the data.
        trainable: their arrays.
        examples: the held-out ones by default.
        trunk: as in `train_pack`.
        sums: gets the targets (or examples, where those are counted), summed loss and right predictions, (members,) each, of every batch.
        texts: gets what each member generated, a text for each of `Examples.prompts`.
        pictures: gets `Examples.picture` of each member's answers, where there is one.
    """
    examples = setup.data.held_out if examples is None else examples
    evaluators = [EVALUATORS.get(name, "task.kind") for name in setup.metrics.held_out]
    of_answers = [e for e in evaluators if e.from_answers is not None]
    of_batches: list[Any] = []
    answers: list[np.ndarray] = []
    weight = 0.0
    for batch in setup.plan.eval_batches(examples):
        inputs = setup.held_out_inputs(batch, trunk)
        *scalars, answered = pack.programs.evaluate(trainable, pack.fixed.settings, pack.part.frozen, inputs)
        of_batches.append(scalars)
        if examples.score is not None or of_answers:
            answers.append(to_host(answered))
        weight += float(total_weight(batch))
        if sums is not None:
            sums.append((float(total_weight(batch)), np.asarray(scalars[0]), np.asarray(scalars[1])))
    loss, right = (np.sum([np.asarray(s[i]) for s in of_batches], axis=0) / weight for i in range(2))
    means = _means([s[2] for s in of_batches])
    groups = setup.plan.eval_groups(examples) if answers else []
    scores = _scores(groups, examples, answers, of_answers) if answers else {}
    if pictures is not None and answers and examples.picture is not None:
        members = range(len(pack.configs))
        pictures += [examples.picture(by_example(groups, examples, [batch[member] for batch in answers])) for member in members]
    if examples.prompts is not None:
        generated = decode_pack(pack, setup, trainable, examples.prompts)
        scores |= _scores_of_texts(generated, examples.prompts, evaluators)
        if texts is not None:
            texts += generated
    metrics: dict[str, np.ndarray] = {}
    for evaluator in evaluators:
        if evaluator.name in scores:
            metrics[evaluator.name] = scores[evaluator.name]
        elif evaluator.name in means:
            metrics[evaluator.name] = means[evaluator.name]
        elif evaluator.from_means is not None:
            metrics[evaluator.name] = evaluator.from_means(loss, right)
        else:
            raise RunError(f"neither an evaluator nor the task's scorer or objective computes the metric '{evaluator.name}'.")
    return metrics | {name: scores[name] for name in setup.metrics.tables}


def decode_pack(pack: Pack, setup: Setup, trainable: Arrays, prompts: Prompts) -> list[list[str]]:
    """What each member generates after each prompt. All members decode at once, over one base.

    Those of a method that needs arrays as large as the weights decode one after the other, as they train. The batches have as many rows
    as a training micro-batch has examples.
    """

    def model(member: int) -> Any:
        own, settings = ({name: array[member] for name, array in part.items()} for part in (trainable, pack.fixed.settings))
        return pack.part.merge(own, settings, pack.part.frozen, training=False)

    members = range(len(pack.configs))
    apart = method_of(pack.configs[0].adapter).packs == "weight-sized"
    found: list[list[str]] = []
    for group in [[member] for member in members] if apart else [members]:
        size = min(setup.plan.micro_batch, len(prompts))
        found += decode_prompts([model(member) for member in group], prompts, setup.data.tokenizer, batch_size=size)
    return found


def _scores_of_texts(generated: Sequence[Sequence[str]], prompts: Prompts, evaluators: Sequence[Evaluator]) -> dict[str, np.ndarray]:
    """The metrics computed from texts, each (members,) float32."""
    found = {e.name: e.from_texts for e in evaluators if e.from_texts is not None}
    return {name: np.array([score(texts, prompts.references) for texts in generated], np.float32) for name, score in found.items()}


def _means(of_batches: Sequence[Means]) -> dict[str, np.ndarray]:
    """What else the objective says: name -> (members,), over all batches; NaN where they have nothing of it."""
    names = of_batches[0] if of_batches else {}
    totals = {name: [np.sum([np.asarray(batch[name][i]) for batch in of_batches], axis=0) for i in range(2)] for name in names}
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: value / weight for name, (value, weight) in totals.items()}


def _scores(
    groups: Sequence[np.ndarray], examples: Examples, answers: Sequence[np.ndarray], evaluators: Sequence[Evaluator]
) -> dict[str, np.ndarray]:
    """The metrics computed from answers, each (members,); `answers` has one array (members, targets, ...) per batch."""
    wanted = [examples.wanted(i) for i in range(len(examples))] if evaluators else []
    scores = []
    for member in range(len(answers[0])):
        given = by_example(groups, examples, [batch[member] for batch in answers])
        found = {e.name: e.from_answers(given, wanted) for e in evaluators if e.from_answers is not None}
        scores.append(found | ({} if examples.score is None else examples.score(given)))
    return {name: np.array([s[name] for s in scores], np.float32) for name in scores[0]}


def by_example(groups: Sequence[np.ndarray], examples: Examples, answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Answers of batches, (targets, ...) each, as those of each example, in the order of the examples.

    Args:
        groups: which examples each batch holds (`BatchPlan.eval_groups`).
    """
    own: dict[int, np.ndarray] = {}
    for group, batch in zip(groups, answers, strict=True):
        ends = np.cumsum(examples.target_counts[group])
        own |= dict(zip(group.tolist(), np.split(batch, ends)[:-1], strict=True))
    return [own[i] for i in range(len(own))]


@dataclasses.dataclass
class Tested:
    """What the members of a pack scored on the test rows, once, when they ended.

    Attributes:
        metrics: as `evaluate_pack` gives them.
        of_best: (members,) bool, whether a member's best arrays were scored; else its final ones. It is what the member saves.
        batches: the test rows come in batches, the same for all members: targets, or examples where those are counted, (batches,), and
            the sums of losses and of right
            predictions over them, (batches, members). Differences between members can be paired by them.
    """

    metrics: dict[str, np.ndarray]
    of_best: np.ndarray
    batches: tuple[np.ndarray, np.ndarray, np.ndarray]


def test_pack(pack: Pack, setup: Setup, examples: Examples, final: Arrays, best: Arrays, trunk: Trunk | None) -> Tested:
    """Scores what each member keeps as its result: its best arrays, unless only the final ones are saved."""
    of_best = np.array([c.tracking.save != "final" for c in pack.configs])
    arrays = best if of_best.all() else final
    if of_best.any() and not of_best.all():
        arrays = {n: jnp.where(jnp.asarray(of_best).reshape(-1, *([1] * (a.ndim - 1))), best[n], a) for n, a in final.items()}
    sums: list[tuple[float, np.ndarray, np.ndarray]] = []
    metrics = evaluate_pack(pack, setup, arrays, examples, trunk=trunk, sums=sums)
    targets, losses, right = (np.stack(column) for column in zip(*sums, strict=True))
    return Tested(metrics, of_best, (targets, losses, right))
