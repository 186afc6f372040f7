"""What Hugging Face's libraries call the kinds of models: classes of transformers, pipeline tags of model cards, task types of PEFT."""

from __future__ import annotations

import dataclasses

from flax import nnx

from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.families import families
from ..models.families.base import Head
from ..models.heads import Classifier


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        ending: of the names of transformers' classes.
        pipeline: tag of a model card.
        task_type: in PEFT's config.
        head_modules: what PEFT saves with this task type, whichever of them the model has.
    """

    ending: str
    pipeline: str
    task_type: str
    head_modules: tuple[str, ...] = ()

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads any family's model of this kind.

        >>> Kind("Model", "feature-extraction", "FEATURE_EXTRACTION").auto_class
        'AutoModel'
        """
        return "AutoModel" + self.ending.removeprefix("Model")


# A base by itself, or the kind of its head (`models/head_shape.py`).
KINDS = {
    "encoder": Kind("Model", "feature-extraction", "FEATURE_EXTRACTION"),
    "decoder": Kind("ForCausalLM", "text-generation", "CAUSAL_LM"),
    "classification": Kind("ForSequenceClassification", "text-classification", "SEQ_CLS", ("classifier", "score")),
    "token_classification": Kind("ForTokenClassification", "token-classification", "TOKEN_CLS", ("classifier", "score")),
    "question_answering": Kind("ForQuestionAnswering", "question-answering", "QUESTION_ANS", ("qa_outputs",)),
}


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
    return None if origin is None or model.kind is None else families()[origin.model_type].heads(origin.config).get(model.kind)
