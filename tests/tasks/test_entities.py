"""Entities in labels, counted as `conlleval` counts them."""

from __future__ import annotations

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
