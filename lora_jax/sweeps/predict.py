"""What a trained member says of the rows of a file, written as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, BatchPlan, Example, Examples
from ..errors import InputError
from ..generation.generate import decode_prompts
from ..models.encoder_decoder import EncoderDecoder
from ..packing.pack import Member
from ..tasks.base import Prediction, task_of
from ..tasks.prepare import rows_to_predict
from ..tracking import Progress, write_atomic
from ..tracking.files import finite_or_none
from ..training.evaluation import by_example
from ..weights.tokenizer import load_tokenizer
from .restore import restore_member


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What was written.

    Attributes:
        path: the file.
        rows: how many lines it has.
        score: the mean over rows; None where the source does not say what is right, or nothing scores it.
    """

    path: Path
    rows: int
    score: float | None


def predict_member(
    run: Path, member: Member, source: str, output: Path, *, batch_size: int, max_new_tokens: int | None, progress: Progress
) -> Predicted:
    """Writes a line of JSON for each row of a source: `row` (its number), `input`, `reference`, `output` and `score`.

    Args:
        run: the run directory.
        member: of it, with a saved adapter.
        source: rows, in the forms of `task.source`, with the columns that the task reads; those that say what is right may be missing.
        output: the file; nothing may be there.
        batch_size: rows at a time.
        max_new_tokens: the largest number of tokens that are generated; as the task has it by default.
        progress: the console.

    Raises:
        InputError: `output` exists; the source, a column or a row will not do; the task predicts nothing that can be written.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"--output: {output} already exists and is not overwritten. Give another file, or remove it.")
    section, task = member.config.task, task_of(member.config.task)
    if not isinstance(section, TaskConfig):
        raise InputError(f"--source: the task of {run} reads no rows.")
    restored = restore_member(run, member, readout=True)
    model, classes = restored.model, restored.classes
    if not task.tokenized:
        if max_new_tokens is not None:
            raise InputError(f"--max-new-tokens: the task of {run} generates no text.")
        asked = task.rows_to_answer(section, getattr(model, "base", None), source, classes)
        with progress.track(len(asked.numbers), "predicting") as track:
            answers = [a for a in answer_all(model, asked.examples, asked.batches, batch_size) or [] if a is not None]
            track.update(len(asked.numbers))
        return _written(output, asked.numbers, asked.predictions(answers))
    tokenizer = load_tokenizer(member.config.model.source)
    rows, labelled = rows_to_predict(task, section, source, classes)
    base: Any = getattr(model, "base", None)
    prompts = (task.source_prompts if isinstance(base, EncoderDecoder) else task.prompts)(section, rows, tokenizer)
    if prompts is not None and max_new_tokens is not None:
        prompts = dataclasses.replace(prompts, max_new_tokens=max_new_tokens)
    elif max_new_tokens is not None:
        raise InputError(f"--max-new-tokens: the task of {run} generates no text.")
    with progress.track(len(rows), "predicting") as track:
        if prompts is not None:
            prompts = prompts if labelled else dataclasses.replace(prompts, references=[()] * len(prompts))
            (texts,) = decode_prompts([model], prompts, tokenizer, batch_size=min(batch_size, len(prompts)), told=track.update)
            made = task.judged(section, prompts, texts)
        else:
            encoded = task.encode(section, rows, tokenizer, decoder=base.is_decoder, classes=classes)
            answers = _answers(model, encoded.examples, batch_size, per_example=task.targets == 1)
            if answers is None:
                raise InputError(f"{run}: the task '{task.name}' predicts nothing that could be written.")
            made = task.predictions(section, rows, encoded, answers, classes)
            track.update(len(rows))
    if not labelled:
        made = [dataclasses.replace(one, reference=None, score=None) for one in made]
    return _written(output, rows.numbers, made)


def _written(output: Path, numbers: np.ndarray, made: Sequence[Prediction]) -> Predicted:
    write_atomic(output, "".join(_line(int(number), one) + "\n" for number, one in zip(numbers, made, strict=True)))
    scores = [one.score for one in made if one.score is not None]
    return Predicted(output, len(made), float(np.mean(scores)) if scores else None)


def _line(number: int, one: Prediction) -> str:
    facts = {"row": number, "input": one.input, "reference": one.reference, "output": one.output, "score": one.score}
    return json.dumps(finite_or_none(facts), ensure_ascii=False, allow_nan=False)


def _answers(model: Any, examples: Sequence[Example], batch_size: int, *, per_example: bool) -> list[np.ndarray | None] | None:
    """What the model answers at each example's targets, in order; None of those that have none, and in all where it has no answers."""
    found: list[np.ndarray | None] = [None] * len(examples)
    kept = [i for i, example in enumerate(examples) if (example.targets != NO_TARGET).any()]
    if not kept:
        return found
    some = Examples.of([examples[i] for i in kept])
    own = answer_all(model, some, BatchPlan, batch_size, per_example=per_example)
    if own is None:
        return None
    for i, one in zip(kept, own, strict=True):
        found[i] = one
    return found


def answer_all(model: Any, some: Any, batches: Any, batch_size: int, *, per_example: bool = True) -> list[np.ndarray] | None:
    """What the model answers at each example's targets, in order; None where it answers nothing.

    Args:
        some: the examples, at least one.
        batches: makes their batches, as `BatchPlan` does.
    """
    if not len(some):
        return []
    plan = batches(some, some, batch_size=min(batch_size, len(some)), per_example=per_example, steps=1)
    graphdef, state = nnx.split(nnx.view(model, raise_if_not_found=False, deterministic=True), graph=True)

    @jax.jit
    def answer(state: Any, batch: dict[str, jax.Array]) -> jax.Array | None:
        own = nnx.merge(graphdef, state)
        return own.answers(own.features(batch))

    answered = [answer(state, batch) for batch in plan.eval_batches()]
    if answered[0] is None:
        return None
    return by_example(plan.eval_groups(), some, [np.asarray(batch) for batch in answered])
