"""The frozen bases against transformers on PyTorch: the same real weights and sentences, the same outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_jax.config.locations import resolve  # noqa: E402
from lora_jax.models.loading import load_model  # noqa: E402
from lora_jax.models.tokenizer import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.interop

TOLERANCE = 1e-4  # largest absolute difference, float32
SENTENCES = 20


@pytest.fixture(scope="module")
def texts(reviews: list[tuple[str, int]]) -> list[str]:
    """Sentences from the shortest to the longest, in a mixed order."""
    by_length = sorted({text for text, _ in reviews}, key=len)
    chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, SENTENCES).astype(int)]
    return [chosen[i] for i in np.random.default_rng(0).permutation(SENTENCES)]


@pytest.fixture(scope="module")
def minilm(minilm_source: str) -> tuple[Any, Any, Any]:
    """Ours, theirs and our tokenizer."""
    theirs = transformers.BertModel.from_pretrained(resolve(minilm_source, key="model.source"), dtype=torch.float32)
    return load_model(minilm_source), theirs.eval(), load_tokenizer(minilm_source)


@pytest.fixture(scope="module")
def smollm2(smollm2_source: str) -> tuple[Any, Any, Any]:
    """Ours, theirs and our tokenizer; theirs dequantises the same file."""
    path = resolve(smollm2_source, key="model.source")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return load_model(smollm2_source), theirs.eval(), load_tokenizer(smollm2_source)


def their_output(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def padded(tokenizer: Any, texts: list[str], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention mask, (texts, longest) int32."""
    batch = tokenizer(texts, padding=True, padding_side=side, truncation=True, max_length=128, return_tensors="np")
    return batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(np.int32)


def packed(tokens: np.ndarray, mask: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The right-padded rows laid end to end into rows of `length`, in their order; `where` tells a token's old place."""
    rows: list[list[tuple[int, int]]] = [[]]  # (text, its length)
    for text, count in enumerate(mask.sum(1)):
        if sum(n for _, n in rows[-1]) + count > length:
            rows.append([])
        rows[-1].append((text, int(count)))
    out = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segment_ids", "where")}
    for r, row in enumerate(rows):
        start = 0
        for segment, (text, count) in enumerate(row, 1):
            span = slice(start, start + count)
            out["tokens"][r, span], out["positions"][r, span], out["segment_ids"][r, span] = tokens[text, :count], np.arange(count), segment
            out["where"][r, span] = text * tokens.shape[1] + np.arange(count)
            start += count
    return out


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Also checks that there is something to compare, of a size that makes the tolerance mean something."""
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.5
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_outputs_equal_transformers(
    name: str, side: str, texts: list[str], request: pytest.FixtureRequest, record_property: pytest.RecordProperty
):
    """Last hidden states of the encoder, logits of the decoder, at the real tokens."""
    ours, theirs, tokenizer = request.getfixturevalue(name)
    tokens, mask = padded(tokenizer, texts, side)
    assert len(set(mask.sum(1))) > SENTENCES // 2  # the lengths are mixed
    real = mask == 1
    difference = largest_difference(np.asarray(ours(tokens, mask))[real], their_output(theirs, tokens, mask)[real])
    record_property("max_abs_difference", difference)
    print(f"{name}, {side} padding: largest difference {difference:.2e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_packed_rows_equal_separate_rows(name: str, texts: list[str], request: pytest.FixtureRequest):
    """Several sentences a row, kept apart by segment ids, against transformers' one sentence a row."""
    ours, theirs, tokenizer = request.getfixturevalue(name)
    tokens, mask = padded(tokenizer, texts, "right")
    rows = packed(tokens, mask, length=128)
    assert len(rows["tokens"]) < SENTENCES
    real = rows["segment_ids"] > 0
    output = np.asarray(ours(rows["tokens"], positions=rows["positions"], segment_ids=rows["segment_ids"]))[real]
    where = rows["where"][real]
    reference = their_output(theirs, tokens, mask)
    for separate in (np.asarray(ours(tokens, mask)), reference):
        difference = largest_difference(output, separate.reshape(-1, separate.shape[-1])[where])
        print(f"{name}, packed: largest difference {difference:.2e}")
        assert difference <= TOLERANCE
