"""What Hugging Face's libraries call the kinds of models: classes of transformers, pipeline tags of model cards, task types of PEFT."""

from __future__ import annotations

import dataclasses

from flax import nnx

from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.families import find_family
from ..models.families.base import HEAD_CLASSES, Head
from ..models.head_shape import HEADS
from ..models.heads import Classifier


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        auto_class: of transformers, that loads any family's model of this kind.
        pipeline: tag of a model card.
        task_type: in PEFT's config.
        head_modules: what PEFT saves with this task type, whichever of them the model has.
    """

    auto_class: str
    pipeline: str
    task_type: str
    head_modules: tuple[str, ...] = ()


# Of each kind of head: pipeline tag, task type, PEFT's modules.
_HEADS = (
    ("text-classification", "SEQ_CLS", ("classifier", "score")),
    ("token-classification", "TOKEN_CLS", ("classifier", "score")),
    ("question-answering", "QUESTION_ANS", ("qa_outputs",)),
)
# A base by itself, or the kind of its head.
KINDS = {
    "encoder": Kind("AutoModel", "feature-extraction", "FEATURE_EXTRACTION"),
    "decoder": Kind("AutoModelForCausalLM", "text-generation", "CAUSAL_LM"),
} | {head: Kind(f"AutoModel{HEAD_CLASSES[head]}", *names) for head, names in zip(HEADS, _HEADS, strict=True)}


def kind_of(model: nnx.Module) -> Kind | None:
    """The kind of a model, adapted or not; None where Hugging Face has none for it."""
    modules = [m for _, m in nnx.iter_modules(model)]
    classifier = next((m for m in modules if isinstance(m, Classifier)), None)
    if classifier is not None:
        return KINDS.get(classifier.kind or "")
    base = next((m for m in modules if isinstance(m, Encoder | Decoder)), None)
    return None if base is None else KINDS["decoder" if base.is_decoder else "encoder"]


def head_of(model: Classifier) -> Head | None:
    """The head as the base's family has it; None where the base was not loaded from a checkpoint."""
    origin = model.base.origin
    return None if origin is None or model.kind is None else find_family(origin.config, origin.source).heads(origin.config).get(model.kind)
