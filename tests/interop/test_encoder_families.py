"""Encoder families and heads against transformers: the same small random checkpoint, the same hidden states and logits.

Padding on the left is compared with transformers' own padded on the right where a head reads the first token: transformers reads
position 0 whatever stands there, we read the first real token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_jax.errors import InputError
from lora_jax.models.load import load_model
from lora_jax.models.positions import Relative
from tests import tiny
from tests.interop.zoo import VOCAB, ZOO

pytestmark = pytest.mark.interop

TOLERANCE = 1e-4  # absolute, float32
LENGTHS = (11, 4, 20, 1)
KINDS = {
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token_classification",
    "AutoModelForQuestionAnswering": "question_answering",
}
PLAIN = [name for name, entry in ZOO.items() if entry.head == "AutoModel"]
HEADED = [name for name, entry in ZOO.items() if entry.head in KINDS]


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def padded(name: str, side: str = "both") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random texts padded on a side, or the same first right and then left: tokens, mask, token types (1 in each text's second half)."""
    if side == "both":
        tokens, mask, types = map(np.concatenate, zip(padded(name, "right"), padded(name, "left"), strict=True))
        return tokens, mask, types
    pad = ZOO[name].options["pad_token_id"]
    rng = np.random.default_rng(0)
    longest = max(LENGTHS)
    tokens, mask, types = np.full((len(LENGTHS), longest), pad), *np.zeros((2, len(LENGTHS), longest), int)
    for row, length in enumerate(LENGTHS):
        span = slice(0, length) if side == "right" else slice(longest - length, longest)
        tokens[row, span], mask[row, span] = rng.integers(3, VOCAB, length), 1
        types[row, span] = np.arange(length) >= length / 2
    return tokens, mask, types


def theirs(model: Any, tokens: np.ndarray, mask: np.ndarray, **options: np.ndarray) -> Any:
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask), **{k: torch.tensor(v) for k, v in options.items()})


def check(ours: np.ndarray, reference: np.ndarray) -> None:
    assert ours.shape == reference.shape and np.abs(reference).max() > 0.3  # of a size that makes the tolerance mean something
    assert np.abs(ours - reference).max() <= TOLERANCE


@pytest.mark.parametrize("name", PLAIN)
def test_hidden_states_equal_transformers(zoo, name):
    tokens, mask, _ = padded(name)
    reference = theirs(zoo.model(name), tokens, mask).last_hidden_state.numpy()
    check(tiny.outputs(load_model(str(zoo.source(name))), tokens, mask)[mask == 1], reference[mask == 1])


def logits_of(output: Any) -> np.ndarray:
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return output.logits.numpy()


@pytest.mark.parametrize("name", HEADED)
def test_heads_equal_transformers(zoo, name):
    kind = KINDS[ZOO[name].head]
    model = load_model(str(zoo.source(name)), head=kind)
    tokens, mask, types = padded(name)
    first = kind == "classification" and not model.base.is_decoder
    their_tokens, their_mask, their_types = (
        map(np.concatenate, zip(*[padded(name, "right")] * 2, strict=True)) if first else (tokens, mask, types)
    )
    typed = not model.base.is_decoder and model.base.config.token_types > 1
    options = ({"token_types": types}, {"token_type_ids": their_types}) if typed else ({}, {})
    reference = logits_of(theirs(zoo.model(name), their_tokens, their_mask, **options[1]))
    # BERT's own positions run along the row, so the same text gives other numbers after padding unless they are given.
    positions = {"positions": np.maximum(mask.cumsum(1) - 1, 0)} if first else {}
    ours = tiny.outputs(model, tokens, mask, **options[0], **positions)
    if kind != "classification":
        ours, reference = ours[mask == 1], reference[mask == 1]
    check(ours, reference)
    assert model.class_names == tuple(zoo.model(name).config.id2label.values()) and not model.new


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (8, 16), (32, 100), (6, 1000)])
def test_buckets_of_distances_equal_transformers(buckets, longest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-1499, 1500)
    theirs = make_log_bucket_position(distances, buckets, longest).long().clamp(-buckets, buckets - 1)
    assert Relative(longest, buckets).rows(1500).tolist() == (theirs + buckets).tolist()


def test_a_missing_head_is_told(zoo):
    with pytest.raises(InputError, match="holds no trained head for token_classification"):
        load_model(str(zoo.source("bert-classes")), head="token_classification")
    with pytest.raises(InputError, match=r"no kind 'clasification'. Did you mean 'classification' or"):
        load_model(str(zoo.source("bert-classes")), head="clasification")
