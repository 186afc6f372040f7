"""Metrics of texts: ROUGE, BLEU, chrF, matches, the last number, F1 of words. Where a row has several references the best counts.

ROUGE is `rouge-score`'s F-measure with its stemmer (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), made for
English; BLEU and chrF are sacrebleu's (arXiv:1804.08771), over all rows together, with its default tokenizer. Exact match and F1 of
answers to questions are those of SQuAD 2.0's script (arXiv:1806.03822).
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from .evaluators import Evaluator, References, register

Rows = Callable[[Sequence[str], References], float]


@functools.cache
def _rouge(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import, and few runs need it

    return RougeScorer([name], use_stemmer=True)


# Where a sentence ends: ROUGE-Lsum compares sentence by sentence, and wants each on a line of its own.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def sentence_lines(text: str) -> str:
    """The text with a line for each sentence; a text that has lines already keeps them.

    >>> sentence_lines("Tom sells cars. He is rich!")
    'Tom sells cars.\\nHe is rich!'
    """
    return text if "\n" in text else _SENTENCE_END.sub(lambda end: end[0].rstrip() + "\n", text)


def rouge(name: str) -> Rows:
    """The mean F-measure over rows, 0 to 1; of a row the best over its references.

    Args:
        name: `rouge1`, `rouge2`, `rougeL` or `rougeLsum`, as `rouge-score` calls them.
    """
    lines = sentence_lines if name == "rougeLsum" else lambda text: text

    def score(texts: Sequence[str], references: References) -> float:
        scorer = _rouge(name)
        found = [scorer.score_multi([lines(r) for r in right], lines(text)) for text, right in zip(texts, references, strict=True)]
        return float(np.mean([own[name].fmeasure for own in found]))

    return score


def _rouge_signature(references: References) -> str:
    return f"rouge-score|stemmer:yes|measure:F|version:{importlib.metadata.version('rouge-score')}"


def _streams(references: References) -> list[list[str | None]]:
    """As sacrebleu has them: the first reference of all rows, the second of all rows, ...; None where a row has no more."""
    return [[right[i] if i < len(right) else None for right in references] for i in range(max(map(len, references)))]


def _sacrebleu(name: str, references: References) -> Any:
    import sacrebleu.metrics  # takes a while to import, and few runs need it

    return getattr(sacrebleu.metrics, name)(references=_streams(references))


def corpus(name: str) -> Rows:
    """sacrebleu's score of all rows together, 0 to 100, with its default options.

    Args:
        name: `BLEU` or `CHRF`.
    """
    return lambda texts, references: float(_sacrebleu(name, references).corpus_score(list(texts), None).score)


def _signature(name: str) -> Callable[[References], str]:
    return lambda references: str(_sacrebleu(name, references).get_signature())


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str) -> str:
    """The text in lower case, without punctuation, articles and more than one space in a row.

    >>> cleaned("The  U.S.A., a land")
    'usa land'
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _with_words(right: Sequence[str]) -> list[str]:
    """The right answers, cleaned; those of which nothing is left do not count. The empty one where there is no other."""
    return [r for r in map(cleaned, right) if r] or [""]


def exact_match(given: str, right: Sequence[str]) -> float:
    """1 where an answer equals one of the right ones, else 0. No right one: 1 for the empty answer."""
    return float(cleaned(given) in _with_words(right))


def f1(given: str, right: Sequence[str]) -> float:
    """The best F1 of an answer's words with a right one's, 0 to 1; where either has no word, whether both have none."""
    return max(_f1(cleaned(given).split(), r.split()) for r in _with_words(right))


def _f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    return 2 * sum((Counter(given) & Counter(right)).values()) / (len(given) + len(right))


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The number of an answer as GSM8K writes it (arXiv:2110.14168): the first one after the last `####`, else the last of the text.

    >>> last_number("3 + 4 = 7, so 7,000 times.\\n#### 7,000"), last_number("It is $5.50."), last_number("none")
    (Decimal('7000'), Decimal('5.50'), None)
    """
    _, mark, answer = text.rpartition("####")
    found = _NUMBER.findall(answer)
    if not found and mark:
        found = _NUMBER.findall(text)[-1:]
    return Decimal((found[0] if mark else found[-1]).replace(",", "")) if found else None


def exact(text: str, right: Sequence[str]) -> float:
    """1 where a text equals a reference, but for white space around them."""
    return float(text.strip() in [r.strip() for r in right])


def normalised(text: str, right: Sequence[str]) -> float:
    """1 where they are equal after SQuAD's clean-up: case, punctuation, articles and spaces do not count."""
    return float(cleaned(text) in [cleaned(r) for r in right])


def number(text: str, right: Sequence[str]) -> float:
    """1 where the text's last number equals a reference's."""
    given = last_number(text)
    return float(given is not None and given in [last_number(r) for r in right])


def token_f1(text: str, right: Sequence[str]) -> float:
    """The best F1 of the text's words with a reference's, after the same clean-up, 0 to 1."""
    return f1(text, right)


def mean_of(metric: Callable[[str, Sequence[str]], float]) -> Rows:
    """The mean over rows."""
    return lambda texts, references: float(np.mean([metric(text, right) for text, right in zip(texts, references, strict=True)]))


for _name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
    register(Evaluator(_name, True, percent=True, from_texts=rouge(_name), signature=_rouge_signature))
register(Evaluator("bleu", True, decimals=1, from_texts=corpus("BLEU"), signature=_signature("BLEU")))
register(Evaluator("chrf", True, decimals=1, from_texts=corpus("CHRF"), signature=_signature("CHRF")))
for _metric in (exact, normalised, number, token_f1):
    register(Evaluator(_metric.__name__, True, percent=True, from_texts=mean_of(_metric)))
