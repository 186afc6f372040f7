"""Exact match and F1 of answers, on cases worked out by hand from SQuAD's own definition."""

from __future__ import annotations

import collections
import re
import string

import pytest

from lora_jax.tasks.text_metrics import cleaned, exact_match, f1


def test_what_is_cleaned():
    assert cleaned(" The  Eiffel-Tower's, an\tA.") == "eiffeltowers"
    assert cleaned("theatre anaconda") == "theatre anaconda"  # articles are whole words


@pytest.mark.parametrize(
    ("given", "right", "exact", "overlap"),
    [
        ("the cat", ["A cat."], 1, 1),
        ("black cat", ["cat", "a dog"], 0, 2 / 3),  # precision 1/2, recall 1
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it is in both
        ("fish", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
    ],
)
def test_the_best_right_answer_counts(given, right, exact, overlap):
    assert exact_match(given, right) == exact and f1(given, right) == pytest.approx(overlap)


def _official(right, given):
    """(exact, F1) as SQuAD 2.0's evaluation script computes them, transcribed."""

    def normalize(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def overlap(gold, found):
        gold, found = normalize(gold).split(), normalize(found).split()
        same = sum((collections.Counter(gold) & collections.Counter(found)).values())
        if not gold or not found:
            return int(gold == found)
        if same == 0:
            return 0
        precision, recall = same / len(found), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    right = [r for r in right if normalize(r)] or [""]
    return max(int(normalize(r) == normalize(given)) for r in right), max(overlap(r, given) for r in right)


ODD = [
    "", "the", "A.", "an-other", "another", "1,000", "1000", "U.S.", "us", "the U.S", "\u201ccat\u201d", "cat", "cat\u00a0sat", "cat sat",
    "Cat, sat!", "sat  the\tcat", "a cat a cat", "can't", "cant", "$5", "5", "St\u00e9phane", "stephane", "_", "theatre",
]  # fmt: skip


@pytest.mark.parametrize(
    "right", [[], ["the"], ["the", "cat"], ["cat sat", "1000"], ["\u201ccat\u201d", "A."], ["cant", "an other"], ["U.S.A."], ODD]
)
def test_odd_answers_score_as_in_the_official_script(right):
    for given in ODD:
        assert (exact_match(given, right), f1(given, right)) == pytest.approx(_official(right, given)), given


def official(rows, predictions):
    """(exact match, F1) as SQuAD 1.1's evaluation script (evaluate-v1.1.py) computes them, transcribed."""

    def normalize(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def overlap(given, right):
        given, right = normalize(given).split(), normalize(right).split()
        same = sum((collections.Counter(given) & collections.Counter(right)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(given), same / len(right)
        return 2 * precision * recall / (precision + recall)

    exact = [max(normalize(given) == normalize(r) for r in row["answers"]["text"]) for row, given in zip(rows, predictions, strict=True)]
    f1 = [max(overlap(given, r) for r in row["answers"]["text"]) for row, given in zip(rows, predictions, strict=True)]
    return sum(exact) / len(rows), sum(f1) / len(rows)


def test_given_answers_score_as_in_the_script_of_squad_1():
    """The two scripts differ where nothing is left of a text that is given or right: there 1.1's F1 is 0."""
    given = [g for g in ODD if cleaned(g)]
    for right in (["the cat", "1000"], ["U.S.A.", "sat the cat"], [r for r in ODD if cleaned(r)]):
        rows = [{"answers": {"text": right}}] * len(given)
        ours = [(exact_match(g, right), f1(g, right)) for g in given]
        assert tuple(sum(one) / len(given) for one in zip(*ours, strict=True)) == pytest.approx(official(rows, given))
