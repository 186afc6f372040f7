"""Metrics of texts against values worked out by hand and against the libraries that they come from."""

from __future__ import annotations

import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lora_jax.tasks.evaluators import EVALUATORS
from lora_jax.tasks.text_metrics import exact, last_number, normalised, number, sentence_lines, token_f1

TEXTS = ["The cats sat on the mat.", "Tom sells cars. He is rich.", "nothing alike"]
REFERENCES = [["A cat sat on a mat.", "The cat sits on the mat."], ["Tom is rich. He sells his cars."], ["other words", "nothing"]]


def of(name: str, texts=TEXTS, references=REFERENCES) -> float:
    return EVALUATORS.get(name, "test").from_texts(texts, references)


@pytest.mark.parametrize(
    ("name", "text", "right", "value"),
    [
        ("rouge1", "the cat sat", "the cat", 0.8),  # precision 2/3, recall 1
        ("rouge2", "the cat sat", "the cat", 2 / 3),  # precision 1/2, recall 1
        ("rougeL", "cat the sat", "the cat sat", 2 / 3),  # `the sat` or `cat sat`: 2 of 3 each way
        ("rouge1", "cats", "cat", 1.0),  # the stemmer
        ("rouge1", "", "cat", 0.0),
        # Sentences in another order: the union of their common subsequences is everything, one subsequence is half.
        ("rougeLsum", "He is rich. Tom sells cars.", "Tom sells cars. He is rich.", 1.0),
        ("rougeL", "He is rich. Tom sells cars.", "Tom sells cars. He is rich.", 0.5),
    ],
)
def test_rouge_by_hand(name, text, right, value):
    assert of(name, [text], [[right]]) == pytest.approx(value)


def test_rouge_is_the_librarys_and_the_best_reference_counts():
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        lines = sentence_lines if name == "rougeLsum" else str
        scorer = RougeScorer([name], use_stemmer=True)
        best = [
            max(scorer.score(lines(r), lines(text))[name].fmeasure for r in right) for text, right in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert of(name) == pytest.approx(sum(best) / 3)


def test_sentences_get_lines_of_their_own():
    assert sentence_lines('He said "no." Then: 3.5 more! Yes') == 'He said "no."\nThen: 3.5 more!\nYes'
    assert sentence_lines("a. b\nc. d") == "a. b\nc. d"


def test_bleu_and_chrf_are_sacrebleus():
    streams = [[right[0] for right in REFERENCES], [right[1] if len(right) > 1 else None for right in REFERENCES]]
    assert of("bleu") == sacrebleu.corpus_bleu(TEXTS, streams).score and of("chrf") == sacrebleu.corpus_chrf(TEXTS, streams).score
    # By hand: four words of five right, three of four pairs, two of three triples, one of two fours; no brevity penalty.
    by_hand = 100 * math.exp(sum(math.log(p) for p in (4 / 5, 3 / 4, 2 / 3, 1 / 2)) / 4)
    assert of("bleu", ["a b c d x"], [["a b c d e"]]) == pytest.approx(by_hand)
    signature = EVALUATORS.get("bleu", "test").signature
    assert signature(REFERENCES).startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signature([["a"], ["b"]]).startswith("nrefs:1|")
    assert "rouge-score|stemmer:yes" in EVALUATORS.get("rougeL", "test").signature(REFERENCES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.50 dollars, 3 a day", "1234.50"),
        ("#### -3", "-3"),
        ("so it is $18.", "18"),
        ("first 3, then 4", "4"),
        (".5 of it", "0.5"),
        ("5 then #### nothing", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, value):
    found = last_number(text)
    assert (found is None) == (value is None) and (value is None or found == last_number(value))


def test_matches():
    assert exact(" cat\n", ["dog", "cat"]) == 1 and exact("Cat", ["cat"]) == 0
    assert normalised("The cat.", ["cat"]) == 1 and normalised("cats", ["cat"]) == 0
    assert number("it is 7.0 then", ["3 + 4\n#### 7"]) == 1 and number("7", ["#### 70"]) == 0
    assert number("none", ["none"]) == 0  # no number is not the right number
    assert token_f1("black cat", ["cat", "a dog"]) == pytest.approx(2 / 3)
    assert of("exact", ["a", "b"], [["a"], ["c"]]) == 0.5
    assert all(EVALUATORS.get(name, "test").larger_is_better for name in ("rougeL", "bleu", "chrf", "exact", "number", "token_f1"))
