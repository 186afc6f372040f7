"""The real Gemma 3 270M from its GGUF file: tokens, logits and text are those that transformers finds in it (`tests/gemma3.json`)."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.gemma3 import KEPT, NEW, PROMPTS, REFERENCE, SCRIPTS, digest, mixed_lines, padded, texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(gemma3_source: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and transformers' answers."""
    return lora_jax.load_model(gemma3_source), lora_jax.load_tokenizer(gemma3_source), json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_tokens(gemma):
    """200 lines of mixed scripts; each comes back but for what a special token stands for."""
    _, tokenizer, expected = gemma
    lines = mixed_lines(200)
    assert len(set(lines)) > 195 and set(SCRIPTS) <= set(lines)
    rows = tokenizer(lines)["input_ids"]
    assert digest(rows) == expected["tokens"]
    for line, row in zip(lines, rows, strict=True):
        if "▁" not in line and not any(f"<{name}" in line for name in ("bos", "eos", "unused", "start")):
            assert tokenizer.decode(row, skip_special_tokens=True) == line
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 1, 0, 3)
    assert len(tokenizer) == 262144 and tokenizer.chat_template is None
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]


def test_logits(gemma):
    """At the last token of ten texts in three languages."""
    model, tokenizer, expected = gemma
    arrays = padded(tokenizer(texts())["input_ids"], tokenizer.pad_token_id)
    hidden = model.hidden(*(jnp.asarray(array) for array in arrays))
    logits = np.asarray(model.head(hidden[:, -1]))
    np.testing.assert_allclose(logits[:, ::KEPT], expected["logits"], atol=1e-3)


def test_answers(gemma):
    """Greedy tokens of ten prompts, in one batch."""
    model, tokenizer, expected = gemma
    outputs = lora_jax.generate(model, PROMPTS, tokenizer, max_new_tokens=NEW, stop=[])
    for prompt, output, tokens in zip(PROMPTS, outputs, expected["greedy"], strict=True):
        assert output.tokens == tokens, (prompt, output.text, tokenizer.decode(tokens))
    assert outputs[2].text.startswith(" 100 degrees Celsius.")
