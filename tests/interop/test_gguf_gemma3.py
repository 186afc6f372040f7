"""The real Gemma 3 270M against transformers' reading of the same GGUF file, which takes it minutes."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import lora_jax
from tests.gemma3 import NEW, PROMPTS, REFERENCE, Peer, mixed_lines, padded, texts

pytestmark = [pytest.mark.interop, pytest.mark.long]


@pytest.fixture(scope="module")
def gemma(gemma3_source: str) -> tuple[Any, Any, Peer]:
    """Our model and tokenizer, and theirs."""
    return lora_jax.load_model(gemma3_source), lora_jax.load_tokenizer(gemma3_source), Peer()


@pytest.fixture(scope="module")
def answers(gemma) -> dict[str, Any]:
    return gemma[2].answers()


def test_tokens_of_200_lines_in_mixed_scripts(gemma):
    _, tokenizer, peer = gemma
    lines = mixed_lines(200)
    for line, row in zip(lines, peer.ids(lines), strict=True):
        assert tokenizer(line)["input_ids"] == row, line
    assert len(tokenizer) == len(peer.tokenizer)


def test_every_logit_of_ten_texts_in_three_languages(gemma):
    model, tokenizer, peer = gemma
    rows = tokenizer(texts())["input_ids"]
    logits = np.asarray(model(*(jnp.asarray(array) for array in padded(rows, tokenizer.pad_token_id))))
    far = [float(np.abs(ours[-len(row) :] - peer.logits(row)).max()) for row, ours in zip(rows, logits, strict=True)]
    print(f"largest difference of a logit: {max(far):.2e}")
    assert len(far) == 10 and max(far) < 1e-3


def test_48_greedy_tokens_of_ten_prompts(gemma, answers):
    """One batch, padded on the left."""
    model, tokenizer, _ = gemma
    outputs = lora_jax.generate(model, PROMPTS, tokenizer, max_new_tokens=NEW, stop=[])
    for prompt, output, tokens in zip(PROMPTS, outputs, answers["greedy"], strict=True):
        assert output.tokens == tokens, (prompt, output.text, tokenizer.decode(tokens))


def test_the_answers_that_are_kept_are_these(answers):
    kept = json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert kept["tokens"] == answers["tokens"] and kept["greedy"] == answers["greedy"]
    np.testing.assert_allclose(kept["logits"], answers["logits"], atol=5e-4)
