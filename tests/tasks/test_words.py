"""Labels of words at their first tokens, and rows that will not do."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax.data.batching import NO_TARGET
from lora_jax.errors import InputError
from lora_jax.tasks.token_classification import encode_words, pieces_of, word_scorer, words_of
from tests.tasks.test_prepare import BERT, CLS, SEP, ids

CLASSES = ("O", "B-X", "I-X")
N = NO_TARGET


def test_a_label_stands_at_a_words_first_token():
    (example,), _ = encode_words([(["a", "good:bad", "c"], ["O", "B-X", "I-X"])], BERT, CLASSES, 16)
    assert example.tokens.tolist() == [CLS, *ids("a good : bad c"), SEP]
    assert example.targets.tolist() == [N, 0, 1, N, N, 2, N]


def test_words_beyond_the_length_have_no_label():
    (example,), _ = encode_words([(["a", "b:c", "d"], ["O", "B-X", "I-X"])], BERT, CLASSES, 5)
    assert example.tokens.tolist() == [CLS, *ids("a b :"), SEP] and example.targets.tolist() == [N, 0, 1, N, N]
    with pytest.raises(InputError, match=r"task\.max_length: 2 leaves no room"):
        encode_words([(["a"], ["O"])], BERT, CLASSES, 2)


def test_a_byte_level_tokenizer_sees_spaces_between_words():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    (example,), _ = encode_words([(["ab", "c"], ["B-X", "O"])], tokenizer, CLASSES, 16)
    assert tokenizer.decode(example.tokens) == "ab c" and example.targets.tolist() == [1, N, 0, N]
    assert pieces_of([["a", "b"]], tokenizer) == [["a", " b"]] and pieces_of([["a", "b"]], BERT) == [["a", "b"]]


@pytest.mark.parametrize(
    ("words", "labels", "message"),
    [
        (["a", "b"], ["O"], "here: 2 words and 1 labels"),
        ([], [], "here: has no words"),
        (["a", None], ["O", "O"], "here: None is not a word"),
        (["a", " "], ["O", "O"], "here: ' ' is not a word"),
        (["a"], [["O"]], "here: \\['O'\\] is not a label"),
        (3, ["O"], "here: the words are a int, neither a list nor a text"),
    ],
)
def test_rows_that_will_not_do(words, labels, message):
    with pytest.raises(InputError, match=message):
        words_of(words, labels, "here")


def test_words_may_be_a_text_and_labels_numbers():
    assert words_of("a  b", [0, 12], "here") == (["a", "b"], ["0", "12"])


def test_scores():
    examples, _ = encode_words([(["a", "b:c", "d"], ["O", "B-X", "I-X"]), (["a"], ["O"])], BERT, CLASSES, 16)
    score = word_scorer(examples, CLASSES)
    assert score([np.array([0, 1, 2]), np.array([0])]) == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1}
    assert score([np.array([0, 1, 0]), np.array([0])]) == {"accuracy": 0.75, "precision": 0, "recall": 0, "f1": 0}
    assert set(word_scorer(examples, ("x", "y", "z"))([np.array([0, 1, 2]), np.array([1])])) == {"accuracy"}
