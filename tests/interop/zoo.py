"""Tiny random Hugging Face models, at least two a family, that between them use every option the family has.

`ZOO` names them; the fixture `zoo` (in `conftest.py`) gives the folder that transformers saved one to, and the model itself. Width
32, two to four layers, 128 tokens; every parameter is drawn, biases and norms too, and large enough that a wrong one shows.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

VOCAB = 128
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        family: Hugging Face's `model_type`.
        options: keyword arguments of its config class.
        head: the auto class that makes it.
    """

    family: str
    options: dict[str, Any]
    head: str = "AutoModelForCausalLM"


def _decoder(family: str, *, head: str = "AutoModelForCausalLM", **options: Any) -> Entry:
    return Entry(family, {**_COMMON, **_SHAPE, "max_position_embeddings": 64, **options}, head)


def _encoder(family: str, *, head: str = "AutoModel", **options: Any) -> Entry:
    return Entry(family, {**_COMMON, **_SHAPE, "max_position_embeddings": 64, **options}, head)


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


ZOO: dict[str, Entry] = {
    # Llama: multi-head and tied; grouped with biases.
    "llama-mha-tied": _decoder("llama", tie_word_embeddings=True, num_key_value_heads=4),
    "llama-gqa-bias": _decoder("llama", num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    # BERT.
    "bert": _encoder("bert"),
    "bert-gelu-new": _encoder("bert", hidden_act="gelu_new", type_vocab_size=3),
    # RoBERTa and its kin: positions counted from the padding's id on.
    "roberta": _encoder("roberta", type_vocab_size=1, pad_token_id=1, bos_token_id=0),
    "xlm-roberta": _encoder("xlm-roberta", num_hidden_layers=3, hidden_act="relu", layer_norm_eps=1e-5),
    # DistilBERT.
    "distilbert": _encoder("distilbert", hidden_dim=48),
    "distilbert-relu": _encoder("distilbert", hidden_dim=64, activation="relu", n_layers=3),
    # The same with heads.
    "bert-classes": _encoder("bert", head="AutoModelForSequenceClassification", num_labels=3),
    "bert-tags": _encoder("bert", head="AutoModelForTokenClassification", num_labels=5),
    "bert-answers": _encoder("bert", head="AutoModelForQuestionAnswering"),
    "roberta-classes": _encoder("roberta", head="AutoModelForSequenceClassification", pad_token_id=1, bos_token_id=0, num_labels=4),
    "camembert-tags": _encoder("camembert", head="AutoModelForTokenClassification", pad_token_id=1, bos_token_id=0, num_labels=3),
    "xlm-roberta-answers": _encoder("xlm-roberta", head="AutoModelForQuestionAnswering"),
    "distilbert-classes": _encoder("distilbert", head="AutoModelForSequenceClassification", hidden_dim=48, num_labels=2),
    "distilbert-tags": _encoder("distilbert", head="AutoModelForTokenClassification", hidden_dim=48, num_labels=3),
    "distilbert-answers": _encoder("distilbert", head="AutoModelForQuestionAnswering", hidden_dim=48),
    "llama-classes": _decoder("llama", head="AutoModelForSequenceClassification", num_key_value_heads=2, num_labels=3),
    "llama-tags": _decoder("llama", head="AutoModelForTokenClassification", tie_word_embeddings=True, num_labels=5),
    "llama-answers": _decoder("llama", head="AutoModelForQuestionAnswering"),
}


class Zoo:
    """The models of `ZOO`, each made when first asked for.

    Args:
        folder: where they are saved.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def source(self, name: str) -> Path:
        """The folder that `save_pretrained` wrote."""
        import torch
        import transformers

        folder = self._folder / name
        if folder.exists():
            return folder
        entry = ZOO[name]
        config = transformers.AutoConfig.for_model(entry.family, **entry.options)
        torch.manual_seed(zlib.crc32(name.encode()))
        model = getattr(transformers, entry.head).from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                parameter.normal_()
                if "norm" in path.lower() or path.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                    parameter.mul_(0.2).add_(0.0 if path.endswith("bias") else 1.0)
                elif parameter.ndim == 1:
                    parameter.mul_(0.3)
                elif "embed" not in path.lower():  # Conv1D's are square or (in, out): near enough
                    parameter.mul_(parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        return folder

    def model(self, name: str) -> Any:
        """The PyTorch model, loaded from its folder: float32, no dropout, attention written out."""
        import torch
        import transformers

        make = getattr(transformers, ZOO[name].head)
        return make.from_pretrained(self.source(name), attn_implementation="eager", dtype=torch.float32).eval()
