"""Entities in labels, counted as `conlleval` counts them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.tasks.token_classification import entities, entity_scores, has_entities


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O O", []),
        ("B-X I-X O B-X", [("X", 0, 2), ("X", 3, 4)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X O I-Y", [("X", 0, 2), ("Y", 3, 4)]),  # an I- after nothing of its kind starts one
        ("B-X I-Y I-Y", [("X", 0, 1), ("Y", 1, 3)]),
        ("B-first-name I-first-name", [("first-name", 0, 2)]),
    ],
)
def test_entities_of_a_text(labels, found):
    assert entities(labels.split()) == found


def test_an_entity_counts_where_kind_and_ends_are_right():
    right = [["B-X", "I-X", "O", "B-Y"], ["B-X"], ["O"]]
    given = [["B-X", "O", "O", "B-Y"], ["B-X"], ["B-Y"]]  # an end is wrong, one is right, one right, one too many
    assert entity_scores(right, given) == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})
    assert entity_scores(right, right) == {"precision": 1, "recall": 1, "f1": 1}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_equal_places_in_other_texts_are_other_entities():
    assert entity_scores([["B-X"], ["O"]], [["O"], ["B-X"]])["f1"] == 0


def test_which_classes_are_parts_of_entities():
    assert has_entities(["O", "B-X"]) and not has_entities(["O"]) and not has_entities(["B", "I", "O"])


def _seqeval(labels):
    """seqeval's `get_entities` (its default mode), transcribed for the trunks B, I and O."""
    found, begin, before, kind_before = [], 0, "O", "_"
    for i, label in enumerate([*labels, "O"]):
        tag, kind = label[0], label[1:].split("-", maxsplit=1)[-1] or "_"
        ends = (before in "BI" and tag in "BO") or (before != "O" and kind_before != kind)
        starts = tag == "B" or (before == "O" and tag == "I") or (tag != "O" and kind_before != kind)
        if ends:
            found.append((kind_before, begin, i))
        if starts:
            begin = i
        before, kind_before = tag, kind
    return found


def test_entities_are_those_of_seqeval():
    rng = np.random.default_rng(0)
    classes = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-A-B", "B-A-B"]
    texts = [[classes[k] for k in rng.integers(0, len(classes), rng.integers(1, 12))] for _ in range(400)]
    assert all(entities(labels) == _seqeval(labels) for labels in texts)
    right, given = texts[:200], [t[: len(r)] + ["O"] * (len(r) - len(t)) for r, t in zip(texts[:200], texts[200:], strict=True)]
    sets = [{(i, *e) for i, labels in enumerate(side) for e in _seqeval(labels)} for side in (right, given)]
    both = len(sets[0] & sets[1])
    precision, recall = both / len(sets[1]), both / len(sets[0])
    assert both and entity_scores(right, given) == pytest.approx(
        {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}
    )
    assert entities(["B-", "I-", "O"]) == [("", 0, 2)]  # an entity without a kind is one all the same
