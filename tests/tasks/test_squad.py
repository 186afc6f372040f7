"""Exact match and F1 of answers, on cases worked out by hand from SQuAD's own definition."""

from __future__ import annotations

import pytest

from lora_jax.tasks.question_answering import cleaned, exact_match, f1


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
