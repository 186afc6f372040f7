"""Windows over contexts, where answers stand in them, and the answer that logits say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tokenizers import processors

from lora_jax.errors import InputError
from lora_jax.tasks.question_answering import answer_scorer, best_span, encode_questions, question_of
from tests.tasks.test_prepare import CLS, SEP, ids, tokenizer

PAIRED = tokenizer()
PAIRED.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
)
CONTEXT = "a b c d 1 2 3 4"


def encoded(answer, *, context=CONTEXT, max_length=9, stride=2):
    rows = [question_of("good :", context, answer, "here")]
    return rows, *encode_questions(rows, [1], PAIRED, max_length=max_length, stride=stride)


def test_windows_share_tokens_and_each_says_where_the_answer_is():
    _, examples, windows = encoded("d 1")
    # 9 tokens less 3 special ones and 2 of the question: 4 of the context, of which 2 are the last window's.
    assert [e.tokens.tolist() for e in examples] == [
        [CLS, *ids("good :"), SEP, *ids(part), SEP] for part in ("a b c d", "c d 1 2", "1 2 3 4")
    ]
    assert [e.targets.tolist() for e in examples] == [[*places, *[-1] * 7] for places in ([0, 0], [5, 6], [0, 0])]
    assert examples[0].types.tolist() == [0] * 4 + [1] * 5
    assert [w.row for w in windows] == [0, 0, 0]
    assert windows[1].spans.tolist() == [[-1, -1]] * 4 + [[4, 5], [6, 7], [8, 9], [10, 11], [-1, -1]]


def test_a_context_that_fits_is_one_window():
    _, examples, _ = encoded("4", max_length=13)
    assert len(examples) == 1 and examples[0].targets.tolist()[:2] == [11, 11]


def test_an_answer_within_a_token_is_that_token():
    rows, examples, windows = encoded({"text": ["oo"], "answer_start": [3]}, context="a good b")
    assert examples[0].targets.tolist()[:2] == [5, 5]
    assert best_span(np.eye(8)[[5, 5]] * 9, windows[0].spans, rows[0].context, 30) == (18, "good")


def test_every_right_answer_is_kept_and_the_first_is_learned():
    found = question_of("q", CONTEXT, {"text": ["2", "1 2"], "answer_start": [10, 8]}, "here")
    assert found.answers == ("2", "1 2") and found.start == 10


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("x", "here: the context does not contain the answer 'x'"),
        ("", "here: the context does not contain the answer ''"),
        ({"text": ["b"], "answer_start": [3]}, "here: the answer 'b' is not at character 3 of the context"),
        ({"text": ["b"], "answer_start": [-1]}, "is not at character -1"),
        ({"text": ["b"], "answer_start": []}, "here: 1 answers but 0 start positions"),
        ({"text": ["b"], "answer_start": ["2"]}, "here: the answer 'b' at '2' is not a text"),
        ({"text": "b"}, "here: the answers should be a text, or lists 'text' and 'answer_start'"),
        (7, "here: the answers should be a text"),
    ],
)
def test_answers_that_will_not_do(answers, message):
    with pytest.raises(InputError, match=message):
        question_of("q", CONTEXT, answers, "here")


@pytest.mark.parametrize(("question", "context", "what"), [("", "a", "question"), ("a", "  ", "context")])
def test_neither_question_nor_context_is_empty(question, context, what):
    with pytest.raises(InputError, match=f"here: the {what} is empty"):
        question_of(question, context, {"text": [], "answer_start": []}, "here")


def test_a_question_that_leaves_no_room_is_named():
    with pytest.raises(InputError, match=r"the question of row 1 has 2 tokens; of 9 in all that leaves 4 .* task\.stride = 4"):
        encoded("b", stride=4)


def test_the_best_span_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    _, _, (window, *_) = encoded("b", max_length=13)
    inside = [i for i in range(len(window.spans)) if window.spans[i, 0] >= 0]
    for longest, _ in itertools.product((1, 3, 30), range(5)):
        logits = rng.standard_normal((2, len(window.spans)))
        value, i, j = max((logits[0, i] + logits[1, j], i, j) for i in inside for j in inside if i <= j < i + longest)
        assert best_span(logits, window.spans, CONTEXT, longest) == (value, CONTEXT[window.spans[i, 0] : window.spans[j, 1]])


def pointing(windows, window, start, end, none=-9.0):
    """Logits that say an answer in one window; nothing in the others."""
    logits = np.full((len(windows), 2, 16), -9.0)
    logits[:, :, 0] = none
    logits[window, 0, start] = logits[window, 1, end] = 1.0
    return list(logits)


def test_scores_are_of_the_best_window_of_each_row():
    rows, _, windows = encoded("d 1")
    score = answer_scorer(rows, windows, 30)
    assert score(pointing(windows, 1, 5, 6)) == {"exact_match": 1, "f1": 1}
    assert score(pointing(windows, 1, 5, 5)) == pytest.approx({"exact_match": 0, "f1": 2 / 3})
    assert score(pointing(windows, 2, 4, 4)) == pytest.approx({"exact_match": 0, "f1": 2 / 3})
    assert score(pointing(windows, 1, 5, 6, none=9.0)) == {"exact_match": 1, "f1": 1}  # each row has an answer: none is no choice
    assert answer_scorer(rows, windows, 1)(pointing(windows, 1, 5, 6))["exact_match"] == 0


def test_no_answer_is_right_where_there_is_none():
    rows = [question_of("good :", CONTEXT, answers, "here") for answers in ("d 1", {"text": [], "answer_start": []})]
    examples, windows = encode_questions(rows, [1, 2], PAIRED, max_length=13, stride=2)
    assert examples[1].targets.tolist()[:2] == [0, 0]
    score = answer_scorer(rows, windows, 30)
    both = [pointing(windows, 0, 7, 8)[0], pointing(windows, 1, 7, 8, none=9.0)[1]]
    assert score(both) == {"exact_match": 1, "f1": 1}
    assert score(both[::-1]) == {"exact_match": 0, "f1": 0}
