"""RoBERTa (arXiv:1907.11692), XLM-RoBERTa (arXiv:1911.02116), CamemBERT: BERT's form, with positions counted from the padding's id on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..encoder import EncoderConfig
from ..head_shape import HeadShape
from .base import Family, Head, encoder_heads, only
from .bert import config_of, weights_of


def _config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    only(hf, "is_decoder", False)
    return config_of(hf, dtype, padding_idx=1 if hf.get("pad_token_id") is None else hf["pad_token_id"])


def _heads(_: Mapping[str, Any]) -> dict[str, Head]:
    # Its classifier has a dense layer of its own and leaves the pooler aside.
    modules = {"pre_classifier": "classifier.dense", "classifier": "classifier.out_proj"}
    return encoder_heads(Head(HeadShape(activation="tanh"), modules))


FAMILY = Family("encoder", _config, weights_of, prefixes=("", "roberta."), heads=_heads)
