"""Named entities in a sequence of labels, and how many of them were found: what CoNLL-2000's `conlleval` and seqeval count."""

from __future__ import annotations

from collections.abc import Sequence

Entity = tuple[str, int, int]


def has_entities(classes: Sequence[str]) -> bool:
    """Whether class names are those of entities' parts: `B-person`, `I-person`, ... and `O`.

    >>> has_entities(["O", "B-LOC", "I-LOC"]), has_entities(["NOUN", "B-ROLL", "VERB"])
    (True, False)
    """
    return any(c != "O" for c in classes) and all(c == "O" or c[:2] in ("B-", "I-") for c in classes)


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of one text: (kind, first word, word after its last).

    A `B-` starts one; so does an `I-` that follows no word of the same kind, as `conlleval` has it.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    found: list[Entity] = []
    kind, start = "", 0
    for place, label in enumerate([*labels, "O"]):
        part, _, name = label.partition("-")
        if kind and (part != "I" or name != kind):
            found.append((kind, start, place))
            kind = ""
        if part != "O" and not kind:
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
