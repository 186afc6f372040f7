"""A class for each word: its label stands at its first token, and nothing is to be predicted at the others.

Where the classes are parts of named entities (`B-person`, `I-person`, `O`) members are compared by the F1 of entities, as CoNLL-2000's
`conlleval` and seqeval count them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..config.doors import TASKS
from ..data.batching import NO_TARGET, Example, Scorer
from ..data.files import as_text
from ..errors import InputError
from .base import Columns, Encoded, Prediction, Rows, TaskMetrics
from .classification import Labelled, LabelledConfig

Words = tuple[list[str], list[str]]


class TokenClassificationConfig(LabelledConfig):
    kind: Literal["token_classification"] = Field(default="token_classification", description="A class for each word.")
    text: str = Field(description="Column of the words: a list, or a text that is split at white space.")
    label: str = Field(description="Column of the words' labels, in the same form.")


@dataclasses.dataclass(frozen=True)
class EncodedWords(Encoded):
    """Rows as examples.

    Attributes:
        labelled: for each example the indices of the words that have a target, in order.
    """

    labelled: list[list[int]] = dataclasses.field(default_factory=list)


class TokenClassification(Labelled):
    """A class for each word."""

    name, section, head = "token_classification", TokenClassificationConfig, "token_classification"

    def columns(self, section: TokenClassificationConfig) -> Columns:
        """Words and labels."""
        both = (section.text, section.label)
        return Columns(both, targets=(section.label,), structured=both, nonempty=(section.label,))

    def read(self, section: TokenClassificationConfig, rows: Rows, key: str) -> Rows:
        """Words and labels as lists."""
        where = [f"{key}: row {number} of {rows.source}" for number in rows.numbers]
        pairs = [words_of(*row) for row in zip(rows.columns[section.text], rows.columns[section.label], where, strict=True)]
        return dataclasses.replace(rows, columns={section.text: [w for w, _ in pairs], section.label: [named for _, named in pairs]})

    def metrics(self, section: TokenClassificationConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The F1 of entities where classes are their parts, else the fraction of words that are right."""
        if has_entities(classes or ()):
            return TaskMetrics(("loss", "accuracy", "precision", "recall", "f1"), "f1", training=("accuracy",))
        return TaskMetrics(("loss", "accuracy"), "accuracy", training=("accuracy",))

    def encode(
        self, section: TokenClassificationConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None
    ) -> Encoded:
        """Each word's class at its first token."""
        assert classes is not None
        words = list(zip(rows.columns[section.text], rows.columns[section.label], strict=True))
        made, labelled = encode_words(words, tokenizer, classes, section.max_length)
        return EncodedWords(made, lambda kept: word_scorer(kept, classes), labelled=labelled)

    def stand_in(
        self, section: TokenClassificationConfig, column: str, row: Mapping[str, Any], classes: tuple[str, ...] | None
    ) -> list[str]:
        """Any class for each word."""
        words = row[section.text]
        words = words.split() if isinstance(words, str) else words
        return [(classes or ("",))[0]] * (len(words) if isinstance(words, list) else 1)

    def predictions(
        self,
        section: TokenClassificationConfig,
        rows: Rows,
        encoded: EncodedWords,
        answers: Sequence[np.ndarray | None],
        classes: tuple[str, ...] | None,
    ) -> list[Prediction]:
        """A class for each word, None for those without a token within `max_length`; the score is the fraction of words that are right."""
        assert classes is not None
        made = []
        columns = zip(rows.columns[section.text], rows.columns[section.label], encoded.labelled, answers, strict=True)
        for words, labels, seen, answer in columns:
            given: list[str | None] = [None] * len(words)
            for word, found in zip(seen, () if answer is None else answer, strict=answer is not None):
                given[word] = classes[int(found)]
            made.append(Prediction(words, given, labels, float(np.mean([a == b for a, b in zip(given, labels, strict=True)]))))
        return made


TASKS.register("token_classification", TokenClassification())


def words_of(words: Any, labels: Any, where: str) -> Words:
    """A row's words and their labels.

    Args:
        words, labels: a list each, or a text that white space cuts.
        where: the row, for messages.

    Raises:
        InputError: no word, a word or label that is no text, or not as many of both.
    """
    both = []
    for name, value in (("word", words), ("label", labels)):
        parts = value.split() if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise InputError(f"{where}: the {name}s are a {type(value).__name__}, neither a list nor a text.")
        for part in parts:
            if isinstance(part, bool) or not (as_text(part) or "").strip():
                raise InputError(f"{where}: {part!r} is not a {name}.")
        both.append([str(as_text(part)) for part in parts])
    found, named = both
    if not found:
        raise InputError(f"{where}: has no words.")
    if len(found) != len(named):
        raise InputError(f"{where}: {len(found)} words and {len(named)} labels.")
    return found, named


def encode_words(rows: Sequence[Words], tokenizer: Any, classes: Sequence[str], max_length: int) -> tuple[list[Example], list[list[int]]]:
    """Tokens of each row, cut to `max_length`, with each word's class at its first token; and which words have one.

    A word of which the tokenizer makes no token (or that is cut off) has no label.

    Args:
        rows: words and labels; every label is a class.
        tokenizer: a transformers fast tokenizer.
    """
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise InputError(f"task.max_length: {max_length} leaves no room for text beside the special tokens.")
    pieces = pieces_of([words for words, _ in rows], tokenizer)
    encoded = tokenizer(pieces, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    made, labelled = [], []
    for i, (_, labels) in enumerate(rows):
        ids = np.array(encoded["input_ids"][i], np.int32)
        targets = np.full(len(ids), NO_TARGET, np.int32)
        before, seen = None, []
        cut = [word for part in encoded.encodings[i].overflowing for word in part.word_ids if word is not None]
        for place, word in enumerate(encoded.word_ids(i)):
            if word is not None and word != before:
                targets[place] = classes.index(labels[word])
                seen.append(word)
            before = word
        kept = max((word for word in encoded.word_ids(i) if word is not None), default=-1)
        made.append(Example(ids, targets, cut=bool(cut), end_cut=max(cut, default=-1) > kept))
        labelled.append(seen)
    return made, labelled


def pieces_of(rows: Sequence[Sequence[str]], tokenizer: Any) -> list[list[str]]:
    """The words as the tokenizer wants them: with the space before each but the first that a byte-level one was trained on.

    (transformers' own check that such a tokenizer was made with `add_prefix_space` is no part of the fast tokenizers that are loaded
    here, and without it all words would be read as the middles of words.)
    """
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
    if two == [*one, *one]:
        return [list(words) for words in rows]
    return [[words[0], *(f" {word}" for word in words[1:])] for words in rows]


def word_scorer(examples: Sequence[Example], classes: Sequence[str]) -> Scorer:
    """Scores predicted classes: the fraction of words that are right, and where classes are parts of entities the scores of entities.

    The scorer takes for each example the (targets,) classes predicted at its targets, in order.
    """
    right = [[classes[int(t)] for t in e.targets if t != NO_TARGET] for e in examples]

    def score(answers: Sequence[np.ndarray]) -> dict[str, float]:
        given = [[classes[int(t)] for t in answer] for answer in answers]
        pairs = [pair for a, b in zip(right, given, strict=True) for pair in zip(a, b, strict=True)]
        scores = {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}
        return scores | entity_scores(right, given) if has_entities(classes) else scores

    return score


Entity = tuple[str, int, int]


def has_entities(classes: Sequence[str]) -> bool:
    """Whether class names are those of entities' parts: `B-person`, `I-person`, ... and `O`.

    >>> has_entities(["O", "B-LOC", "I-LOC"]), has_entities(["NOUN", "B-ROLL", "VERB"])
    (True, False)
    """
    return any(c != "O" for c in classes) and all(c == "O" or c[:2] in ("B-", "I-") for c in classes)


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of one text: (kind, first word, word after its last).

    A `B-` starts one; so does an `I-` that follows no word of the same kind, as in `conlleval`.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    found: list[Entity] = []
    kind: str | None = None
    start = 0
    for place, label in enumerate([*labels, "O"]):
        part, _, name = label.partition("-")
        if kind is not None and (part != "I" or name != kind):
            found.append((kind, start, place))
            kind = None
        if part != "O" and kind is None:
            kind, start = name, place
    return found


def entity_scores(right: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all texts' entities; one is found where its kind and both of its ends are. 0 where there is none.

    Args:
        right, given: for each text its labels, one a word.
    """
    wanted = {(i, *entity) for i, labels in enumerate(right) for entity in entities(labels)}
    found = {(i, *entity) for i, labels in enumerate(given) for entity in entities(labels)}
    both = len(wanted & found)
    precision, recall = both / max(len(found), 1), both / max(len(wanted), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * both / max(len(found) + len(wanted), 1)}
