"""Which head a base is given."""

from __future__ import annotations

from flax import nnx

from ..errors import InputError, hint
from .decoder import Decoder
from .detector import Detector
from .encoder import Encoder
from .encoder_decoder import Base, EncoderDecoder
from .heads import Classifier, ImageClassifier, QuestionAnswerer, SequenceClassifier, TokenClassifier
from .layers import HEADS
from .vision import VisionBase
from .vision_transformer import VisionTransformer


def add_head(base: Base, kind: str, classes: int = 2, *, pooling: str = "cls", rngs: nnx.Rngs) -> Classifier:
    """A base with a new head, of the form that transformers gives the base's family.

    Args:
        base: an `Encoder`, `Decoder` or `VisionBase`; it is shared, not copied.
        kind: `classification` (one class a text), `token_classification`, `question_answering` (start and end logits),
            `image_classification` or `object_detection`.
        classes: how many; of `question_answering` always 2.
        pooling: what `classification` reads: `cls`, the first token (a decoder's last), or the `mean`.
        rngs: draws the head.

    Raises:
        InputError: no such kind, or none for this base.
    """
    check_head(kind)
    if isinstance(base, VisionBase) and kind == ImageClassifier.kind:
        return ImageClassifier(base, classes, rngs=rngs)
    if isinstance(base, VisionBase) and kind == Detector.kind and (base.queries or isinstance(base, VisionTransformer)):
        return Detector(base, classes, rngs=rngs)
    if not isinstance(base, Encoder | Decoder) or kind in (ImageClassifier.kind, Detector.kind):
        raise InputError(f"head: there is none of kind '{kind}' on {_BASES.get(type(base), 'a base over images')}.")
    if kind == "classification":
        return SequenceClassifier(base, classes, pooling, rngs=rngs)
    if kind == "token_classification":
        return TokenClassifier(base, classes, rngs=rngs)
    return QuestionAnswerer(base, rngs=rngs)


_BASES = {Encoder: "an encoder", Decoder: "a decoder", EncoderDecoder: "an encoder-decoder"}


def check_head(kind: str) -> None:
    """`InputError` unless there is such a kind of head."""
    if kind not in HEADS:
        raise InputError(f"head: there is no kind '{kind}'. {hint(kind, HEADS)}")
