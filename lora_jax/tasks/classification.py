"""One class for each text: an encoder answers with a head, a decoder with the word that stands for the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from ..config.doors import TASKS
from ..data.batching import NO_TARGET, Example, Scorer
from ..data.tokens import encoder_texts, plain_ids, start_ids, with_start
from ..errors import InputError, hint, warn
from ..models.add_head import add_head
from ..models.decoder import Decoder
from ..models.heads import LabelWordClassifier, LanguageModel
from .base import Base, Columns, Encoded, HeadTaskConfig, Prediction, Rows, Task, TaskData, TaskMetrics
from .teachers import DistillConfig, Taught


class LabelledConfig(HeadTaskConfig):
    """The section of a task whose targets are classes that the data names."""

    text: str = Field(description="Text column.")
    label: str = Field(description="Label column.")
    labels: list[str] | None = Field(default=None, description="Class names in order. Default: those in the data, sorted.")


class ClassificationConfig(LabelledConfig):
    kind: Literal["classification"] = Field(default="classification", description="A class for each text.")
    label_words: list[str] | None = Field(default=None, description="On a decoder: the word for each class. Default: the class names.")
    template: str = Field(default="{text}\nAnswer:", description="On a decoder: the prompt around {text}.")
    pooling: Literal["cls", "mean"] = Field(
        default="cls", description="On an encoder: the first token (through BERT's pooler), or the mean of all."
    )
    distill: DistillConfig | None = Field(default=None, description="A teacher whose logits are met beside the right classes.")

    @model_validator(mode="after")
    def _template(self) -> ClassificationConfig:
        if "{text}" not in self.template:
            raise ValueError("'template' must contain {text}")
        if self.label_words and self.labels and len(self.label_words) != len(self.labels):
            raise ValueError(f"'label_words' has {len(self.label_words)} entries, 'labels' has {len(self.labels)}")
        return self


class Labelled(Task):
    """What tasks with named classes share: which classes there are, and that every label is one of them."""

    def classes(self, section: Any, rows: Rows, known: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `task.labels`, of a loaded head, or all labels of the rows, sorted."""
        if section.labels is not None and known and len(known) != len(section.labels):
            raise InputError(f"task.labels: {len(section.labels)} classes; the model's head has {len(known)}: {', '.join(known)}.")
        if section.labels is None and not known:
            found = {label for _, label in _labels(rows, section.label)}
            # Numbers in the order of numbers: 2 before 10.
            classes = tuple(sorted(found, key=(lambda f: (int(f), f)) if all(f.isdecimal() for f in found) else None))
            _say_of_near_ones(rows, classes)
        else:
            classes = tuple(section.labels or known)
            if len(set(classes)) < len(classes):
                raise InputError("task.labels: a class is named twice.")
            _check_labels(rows, section.label, classes)
        if len(classes) < 2:
            raise InputError(
                f"task.label: the column '{section.label}' has one value only ({', '.join(classes)}); classification needs two classes."
            )
        return classes

    def check_held_out(self, section: Any, rows: Rows, classes: tuple[str, ...] | None) -> None:
        """`InputError` for a label that is no class."""
        _check_labels(rows, section.label, classes or ())

    def named_classes(self, section: Any) -> tuple[str, ...] | None:
        """Those of `task.labels`."""
        return tuple(section.labels) if section.labels else None

    def needs_classes(self, section: Any, *, decoder: bool) -> bool:
        """The head has an output for each."""
        return True


def _say_of_near_ones(rows: Rows, classes: Sequence[str]) -> None:
    """Warns where a slip of the pen may have made one class two."""
    alike: dict[str, str] = {}
    for name in classes:
        other = alike.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            warn(f"task.label: {rows.source} has the classes {other!r} and {name!r}, which differ in spaces or case alone.")


def _check_labels(rows: Rows, column: str, classes: tuple[str, ...]) -> None:
    known = set(classes)
    for number, label in _labels(rows, column):
        if label not in known:
            raise InputError(
                f"task.labels: row {number} of {rows.source} has the label '{label}'. {hint(label, classes)} Classes: {', '.join(classes)}."
            )


def _labels(rows: Rows, column: str) -> list[tuple[int, str]]:
    """Every label, with its row's number: one a row, or one a word."""
    columns = zip(rows.numbers, rows.columns[column], strict=True)
    return [(int(number), str(label)) for number, value in columns for label in (value if isinstance(value, list) else [value])]


class Classification(Taught, Labelled):
    """A class for each text."""

    name, section, head, targets = "classification", ClassificationConfig, "classification", 1

    def columns(self, section: ClassificationConfig) -> Columns:
        """Texts and labels."""
        return Columns((section.text, section.label), targets=(section.label,), nonempty=(section.label,))

    def metrics(self, section: ClassificationConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """Accuracy; recorded are the mean of the classes' F1, and which classes were taken for which."""
        return TaskMetrics(("loss", "accuracy", "macro_f1"), "accuracy", training=("accuracy",), tables=("confusion", "class_f1"))

    def check_base(self, section: ClassificationConfig, base: Base, source: str) -> None:
        """A decoder has no head to load."""
        if isinstance(base, Decoder) and section.head == "loaded":
            raise InputError("task.head: a decoder classifies by the words for its classes, without a head that could be loaded.")

    def needs_classes(self, section: ClassificationConfig, *, decoder: bool) -> bool:
        """An encoder's head has an output for each; a decoder's words are in its vocabulary."""
        return not decoder

    def model(
        self, section: ClassificationConfig, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None
    ) -> nnx.Module:
        """An encoder with a head; a decoder whose readout is the logits of the classes' words."""
        if not isinstance(base, Decoder):
            return add_head(base, "classification", len(classes or ()), pooling=section.pooling, rngs=nnx.Rngs(0))
        if class_token_ids is None:
            return LanguageModel(base)
        return LabelWordClassifier(base, tuple(int(i) for i in class_token_ids))

    def encode(
        self, section: ClassificationConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None
    ) -> Encoded:
        """A target at an encoder's first token, at a decoder's last."""
        assert classes is not None
        texts, labels = rows.columns[section.text], rows.columns[section.label]
        if decoder:
            before, _, after = section.template.partition("{text}")
            head, tail = (plain_ids(tokenizer, [part])[0] if part else [] for part in (before, after))
            start = start_ids(tokenizer)
            head = with_start(head, start)
            room = section.max_length - len(head) - len(tail)
            if room < 1:
                raise InputError(
                    f"task.max_length: {section.max_length} leaves no room for text beside the template's {len(head) + len(tail)} tokens."
                )
            bare = head == start  # the text comes first, and may bear the token itself
            found = ((with_start(ids, start)[len(start) :] if bare else ids) for ids in plain_ids(tokenizer, texts))
            encoded = [([*head, *ids[:room], *tail], len(ids) > room) for ids in found]
        else:
            encoded = encoder_texts(tokenizer, texts, section.max_length)
        made = []
        for (ids, cut), label in zip(encoded, labels, strict=True):
            targets = np.full(len(ids), NO_TARGET, np.int32)
            if ids:  # an empty text may have no token at all, and is then left out
                targets[-1 if decoder else 0] = classes.index(label)
            made.append(Example(np.array(ids, np.int32), targets, cut=cut))
        return Encoded(made, lambda kept: confusion_scorer(kept, len(classes)))

    def teacher_head(self, section: ClassificationConfig, base: Base) -> str | None:
        """An encoder's own; a decoder has none."""
        return None if isinstance(base, Decoder) else self.head

    def teacher_model(self, section: ClassificationConfig, teacher: Any, data: TaskData) -> Any:
        """The teacher with its head, its classes in the task's order; or read out at the words of the classes."""
        classes = data.classes or ()
        if isinstance(teacher, Decoder):
            assert data.class_token_ids is not None
            return LabelWordClassifier(teacher, tuple(int(i) for i in data.class_token_ids))
        names = teacher.class_names
        if set(names) == set(classes):
            at = jnp.array([names.index(c) for c in classes])
            teacher = nnx.merge(*nnx.split(teacher))  # whose head may be the members' own
            for variable in [v for v in (teacher.classifier.kernel, teacher.classifier.bias) if v is not None]:
                if not isinstance(variable.get_value(), jax.ShapeDtypeStruct):
                    variable.set_value(variable[...][..., at])
        elif len(names) == len(classes) and all(name == f"LABEL_{i}" for i, name in enumerate(names)):
            warn(f"task.distill.teacher: names no classes; its outputs are taken to be {', '.join(classes)}, in this order.")
        else:
            raise InputError(f"task.distill.teacher: its classes are {', '.join(names)}; the task's are {', '.join(classes)}.")
        return teacher

    def stand_in(self, section: ClassificationConfig, column: str, row: Mapping[str, Any], classes: tuple[str, ...] | None) -> str:
        """Any class."""
        return (classes or ("",))[0]

    def predictions(
        self,
        section: ClassificationConfig,
        rows: Rows,
        encoded: Encoded,
        answers: Sequence[np.ndarray | None],
        classes: tuple[str, ...] | None,
    ) -> list[Prediction]:
        """The class of each text; it scores 1 where it is right."""
        assert classes is not None
        made = []
        for text, label, answer in zip(rows.columns[section.text], rows.columns[section.label], answers, strict=True):
            given = None if answer is None else classes[int(answer[0])]
            made.append(Prediction(text, given, label, float(given == label)))
        return made

    def class_tokens(
        self, section: ClassificationConfig, classes: tuple[str, ...] | None, tokenizer: Any, *, decoder: bool
    ) -> np.ndarray | None:
        """The first token of each class's word, as it goes on after the template; None on an encoder."""
        if not decoder or classes is None:
            return None
        words = section.label_words or list(classes)
        if len(words) != len(classes):
            raise InputError(f"task.label_words: {len(words)} words for {len(classes)} classes ({', '.join(classes)}).")
        space = "" if section.template.endswith((" ", "\n")) else " "
        # After the template's last words, not alone: some tokenizers put a space before every text, and would give all words the token
        # of that space.
        tail = section.template.rpartition("{text}")[2] or "a"
        before = plain_ids(tokenizer, [tail])[0]

        def first_token(word: str) -> int | None:
            together, alone = plain_ids(tokenizer, [tail + space + word, space + word])
            fits = together[: len(before)] == before and len(together) > len(before)
            return together[len(before)] if fits else next(iter(alone), None)

        first = [first_token(w) if w.strip() else None for w in words]
        for i, token in enumerate(first):
            if token is None:
                raise InputError(f"task.label_words: the word of class '{classes[i]}' is empty.")
            if token in first[:i]:
                other = words[first.index(token)]
                raise InputError(
                    f"task.label_words: '{words[i]}' and '{other}' begin with the same token; give words that differ from the start."
                )
        return np.array(first, np.int32)


TASKS.register("classification", Classification())


def confusion_scorer(examples: Sequence[Example], classes: int) -> Scorer:
    """Scores predicted classes: `class_f1` (classes,) and its mean `macro_f1` (over the classes that occur, as scikit-learn has it), and
    `confusion`, (classes, classes) counts, the right class down, the predicted one across.

    The scorer takes for each example the (1,) class predicted of it.
    """
    right = np.array([e.targets[e.targets != NO_TARGET][0] for e in examples])

    def score(answers: Sequence[np.ndarray]) -> dict[str, Any]:
        counts = np.zeros((classes, classes), np.int64)
        np.add.at(counts, (right, np.array([answer[0] for answer in answers])), 1)
        f1 = class_f1(counts)
        return {"macro_f1": float(np.nanmean(f1)), "confusion": counts, "class_f1": f1}

    return score


def class_f1(counts: np.ndarray) -> np.ndarray:
    """(classes,) F1 of each class: 2 TP / (2 TP + FP + FN); NaN of one that is neither among the rows nor predicted.

    Args:
        counts: (classes, classes), the right class down.

    >>> class_f1(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]])).round(3).tolist()
    [0.8, 0.667, nan]
    """
    ends = counts.sum(0) + counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * np.diagonal(counts) / ends
