"""The shape of a classification head: what it reads and what stands before its linear classifier."""

from __future__ import annotations

import dataclasses

# The kinds of head a base can bear, beside a decoder's own vocabulary projection; a config's `task.kind` says the same words.
HEADS = ("classification", "token_classification", "question_answering")
# A head's modules, all of which train with it.
HEAD_MODULES = ("pre_classifier", "classifier_norm", "classifier")


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """A head, but for how many classes it has.

    Attributes:
        reads: the hidden state of the `first` or `last` token of each text, the `mean` over them, or `each` of them by itself.
        pooler: whether the first token goes through the base's own pooler, where it has one (BERT).
        activation: of a dense layer before the classifier (`tanh`, `relu`, `gelu`, ...); None where there is no such layer.
        dense_bias: whether that layer has a bias.
        norm: whether a layer norm follows it.
        norm_bias: whether that norm has a bias.
        bias: whether the classifier has one.
    """

    reads: str = "first"
    pooler: bool = False
    activation: str | None = None
    dense_bias: bool = True
    norm: bool = False
    norm_bias: bool = False
    bias: bool = True


# What a base that was not loaded, or whose family says nothing else, takes.
_ENCODER = {
    "classification": HeadShape(pooler=True),
    "token_classification": HeadShape("each"),
    "question_answering": HeadShape("each"),
}
_DECODER = _ENCODER | {"classification": HeadShape("last", bias=False)}


def head_shape(shapes: tuple[tuple[str, HeadShape], ...], kind: str, *, decoder: bool) -> HeadShape:
    """The shape of a head on a base: what its family says in `shapes`, else a linear layer alone."""
    return dict(shapes).get(kind) or (_DECODER if decoder else _ENCODER)[kind]
