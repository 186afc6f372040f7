"""Where a text answers a question: the first and the last token of the answer. A long text is read through windows that overlap.

An example is a window: the question and a part of the text. It has two targets, at its first token the place where the answer starts
and at its second where it ends; both are 0, the first token, where the answer is not (wholly) in it, as in BERT (arXiv:1810.04805,
section 4.3).

Answers are scored as SQuAD 2.0's script does (arXiv:1806.03822): exact match and F1 of words, after the same clean-up of both texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..config.doors import TASKS
from ..config.types import NonNegativeInt, PositiveInt
from ..data.batching import NO_TARGET, Example, Scorer
from ..data.files import as_text
from ..errors import InputError
from .base import Columns, Encoded, HeadTaskConfig, Prediction, Rows, Task, TaskMetrics
from .text_metrics import exact_match, f1


class QuestionAnsweringConfig(HeadTaskConfig):
    kind: Literal["question_answering"] = Field(default="question_answering", description="Where a text answers a question.")
    question: str = Field(description="Question column.")
    context: str = Field(description="Column of the texts that hold the answers.")
    answers: str = Field(description="Answer column: {text: [...], answer_start: [...]} as SQuAD has it, or a text.")
    stride: NonNegativeInt = Field(
        default=32, description="Contexts longer than max_length are split into windows that overlap by this many tokens."
    )
    max_answer: PositiveInt = Field(default=30, description="Maximal number of tokens of an answer.")


class QuestionAnswering(Task):
    """Where a text answers a question."""

    name, section, head, targets = "question_answering", QuestionAnsweringConfig, "question_answering", 2

    def columns(self, section: QuestionAnsweringConfig) -> Columns:
        """Questions, contexts, answers. Questions about one context stay on one side of the split."""
        names = (section.question, section.context, section.answers)
        return Columns(names, targets=names[::2], structured=names[2:], unknown=names[2:])

    def read(self, section: QuestionAnsweringConfig, rows: Rows, key: str) -> Rows:
        """The column of answers holds a `Question` for each row."""
        where = [f"{key}: row {number} of {rows.source}" for number in rows.numbers]
        columns = (rows.columns[name] for name in (section.question, section.context, section.answers))
        asked = [question_of(*row) for row in zip(*columns, where, strict=True)]
        return dataclasses.replace(rows, columns={**rows.columns, section.answers: asked})

    def metrics(self, section: QuestionAnsweringConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The F1 of answers' words."""
        return TaskMetrics(("loss", "exact_match", "f1"), "f1", training=("accuracy",))

    def encode(
        self, section: QuestionAnsweringConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None
    ) -> Encoded:
        """Each row's windows."""
        asked = rows.columns[section.answers]
        made, windows = encode_questions(asked, rows.numbers.tolist(), tokenizer, max_length=section.max_length, stride=section.stride)
        return EncodedQuestions(made, lambda _: answer_scorer(asked, windows, section.max_answer), windows=windows)

    def stand_in(self, section: QuestionAnsweringConfig, column: str, row: Mapping[str, Any], classes: tuple[str, ...] | None) -> Any:
        """The whole context: where answers are not known, each question is taken to have one."""
        return row[section.context]

    def predictions(
        self,
        section: QuestionAnsweringConfig,
        rows: Rows,
        encoded: EncodedQuestions,
        answers: Sequence[np.ndarray | None],
        classes: tuple[str, ...] | None,
    ) -> list[Prediction]:
        """The answer to each question; the score is its F1."""
        asked = rows.columns[section.answers]
        given = best_answers(asked, encoded.windows, [a for a in answers if a is not None], section.max_answer)
        said = [{"question": row.question, "context": row.context} for row in asked]
        return [Prediction(q, text, list(row.answers), f1(text, row.answers)) for q, text, row in zip(said, given, asked, strict=True)]


TASKS.register("question_answering", QuestionAnswering())


@dataclasses.dataclass(frozen=True)
class Question:
    """A row.

    Attributes:
        answers: all that are right; none where the text holds no answer.
        start: where the first of them starts in the context, in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Where an example's tokens stand in its row's context.

    Attributes:
        row: which.
        spans: (length, 2) int, characters of each token in the context; -1 for tokens of the question and special ones.
    """

    row: int
    spans: np.ndarray


@dataclasses.dataclass(frozen=True)
class EncodedQuestions(Encoded):
    """Rows as examples.

    Attributes:
        windows: one for each example.
    """

    windows: list[Window] = dataclasses.field(default_factory=list)


def question_of(question: Any, context: Any, answers: Any, where: str) -> Question:
    """A row's question.

    Args:
        answers: `{text: [...], answer_start: [...]}` as SQuAD has them, both empty where there is no answer; or the answer itself, which
            then is where it first stands in the context.
        where: the row, for messages.

    Raises:
        InputError: another form, or an answer that is not where it should be.
    """
    for what, text in (("question", question), ("context", context)):
        if not text.strip():
            raise InputError(f"{where}: the {what} is empty.")
    if isinstance(answers, str):
        start = context.find(answers) if answers else -1
        if start < 0:
            raise InputError(f"{where}: the context does not contain the answer {answers!r}.")
        return Question(question, context, (answers,), start)
    texts, starts = (answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise InputError(f"{where}: the answers should be a text, or lists 'text' and 'answer_start'.")
    if len(texts) != len(starts):
        raise InputError(f"{where}: {len(texts)} answers but {len(starts)} start positions.")
    texts = [as_text(text) for text in texts]
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int) or not text:
            raise InputError(f"{where}: the answer {text!r} at {start!r} is not a text and a start position.")
        if start < 0 or context[start : start + len(text)] != text:
            raise InputError(f"{where}: the answer {text!r} is not at character {start} of the context.")
    return Question(question, context, tuple(map(str, texts)), starts[0] if starts else -1)


def encode_questions(
    rows: Sequence[Question], numbers: Sequence[int], tokenizer: Any, *, max_length: int, stride: int
) -> tuple[list[Example], list[Window]]:
    """Every row's windows, in order.

    Args:
        rows: at least one.
        numbers: of the rows in their file, for messages.
        tokenizer: a transformers fast tokenizer.
        max_length: tokens of a window, question and special ones among them.
        stride: tokens of the context that successive windows share.

    Raises:
        InputError: a question leaves no room for more of the context than the windows share.
    """
    questions = [row.question.strip() for row in rows]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    for number, ids in zip(numbers, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
        if (left := room - len(ids)) <= stride:
            raise InputError(
                f"task.max_length: the question of row {number} has {len(ids)} tokens; of {max_length} in all that leaves {max(0, left)} "
                f"for the context, and windows share task.stride = {stride}."
            )
    encoded = tokenizer(
        questions,
        [row.context for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        padding=False,
    )
    examples, windows = [], []
    for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = np.array(encoded["input_ids"][i], np.int32)
        of_context = np.array([part == 1 for part in encoded.sequence_ids(i)])
        spans = np.where(of_context[:, None], np.array(encoded["offset_mapping"][i]).reshape(-1, 2), -1)
        targets = np.full(len(ids), NO_TARGET, np.int32)
        targets[:2] = _places(rows[row], spans)
        examples.append(Example(ids, targets, np.array(encoded["token_type_ids"][i], np.int32)))
        windows.append(Window(row, spans))
    return examples, windows


def _places(row: Question, spans: np.ndarray) -> tuple[int, int]:
    """The first and the last token of the answer; 0 and 0 where it is not wholly in the window."""
    start, stop = row.start, row.start + len(row.answers[0]) if row.answers else -1
    inside = np.flatnonzero((spans[:, 0] >= 0) & (spans[:, 1] > spans[:, 0]))
    if not row.answers or not len(inside) or spans[inside[0], 0] > start or spans[inside[-1], 1] < stop:
        return 0, 0
    touched = inside[(spans[inside, 0] < stop) & (spans[inside, 1] > start)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


def answer_scorer(rows: Sequence[Question], windows: Sequence[Window], longest: int) -> Scorer:
    """What scores start and end logits: the means over rows of exact match and F1, both 0 to 1.

    The answer to a row is the span with the largest sum of its start's and end's logits in any of its windows. Where some rows have no
    answer, it is none if the first token's own sum is larger in the window where that is smallest (arXiv:1806.03822).

    The scorer takes for each window the logits (2, length or more): of starts, of ends.

    Args:
        longest: tokens of an answer at the most.
    """

    def score(answers: Sequence[np.ndarray]) -> dict[str, float]:
        pairs = list(zip(best_answers(rows, windows, answers, longest), (row.answers for row in rows), strict=True))
        return {name: float(np.mean([metric(*pair) for pair in pairs])) for name, metric in (("exact_match", exact_match), ("f1", f1))}

    return score


def best_answers(rows: Sequence[Question], windows: Sequence[Window], answers: Sequence[np.ndarray], longest: int) -> list[str]:
    """The text that answers each row, as `answer_scorer` finds it; "" for none.

    Args:
        answers: of each window.
    """
    may_be_none = any(not row.answers for row in rows)
    best = [(-np.inf, "")] * len(rows)
    none = np.full(len(rows), np.inf)
    for window, logits in zip(windows, answers, strict=True):
        value, text = best_span(logits[:, : len(window.spans)], window.spans, rows[window.row].context, longest)
        best[window.row] = max(best[window.row], (value, text), key=lambda b: b[0])
        none[window.row] = min(none[window.row], float(logits[0, 0] + logits[1, 0]))
    return ["" if may_be_none and none[i] > value else text for i, (value, text) in enumerate(best)]


def best_span(logits: np.ndarray, spans: np.ndarray, context: str, longest: int) -> tuple[float, str]:
    """The largest sum of a start's logit and that of an end at it or after, and the text between; -inf and "" without any token.

    Args:
        logits: (2, length), of starts and ends.
        spans: (length, 2), as in `Window`.
        longest: tokens from start to end at the most.
    """
    there = np.where((spans[:, 0] >= 0) & (spans[:, 1] > spans[:, 0]), 0.0, -np.inf)
    start, end = logits.astype(np.float64) + there
    best, where = -np.inf, (0, 0)
    for more in range(min(longest, len(start))):
        sums = start[: len(start) - more] + end[more:]
        at = int(sums.argmax())
        if sums[at] > best:
            best, where = float(sums[at]), (at, at + more)
    return (best, context[spans[where[0], 0] : spans[where[1], 1]]) if np.isfinite(best) else (best, "")
