"""Every decoder family against transformers on PyTorch: tiny random checkpoints, equal logits at every real token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lora_jax.models.loading import load_model  # noqa: E402
from tests import tiny  # noqa: E402
from tests.interop.zoo import VOCAB, ZOO, Zoo  # noqa: E402

pytestmark = pytest.mark.interop

DECODERS = [name for name, entry in ZOO.items() if entry.head == "AutoModelForCausalLM"]
LENGTH = 24
TOLERANCE = 1e-4  # absolute, float32


def padded(side: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention mask, (4, LENGTH) int32: rows of 24, 17, 9 and 2 tokens."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (4, LENGTH)).astype(np.int32)
    mask = np.zeros_like(tokens)
    for row, count in enumerate((LENGTH, 17, 9, 2)):
        mask[row, :count] = 1
    mask = mask if side == "right" else mask[:, ::-1]
    return np.where(mask, tokens, 0), np.ascontiguousarray(mask)


def counted(mask: np.ndarray) -> np.ndarray:
    """The position ids that `generate` gives padded rows."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_transformers(zoo: Zoo, name: str):
    theirs = zoo.model(name)
    with tiny.quick_compile():
        model = load_model(str(zoo.source(name)))
        for side in ("right", "left"):
            tokens, mask = padded(side)
            for positions in (None, counted(mask)):
                given = {} if positions is None else {"position_ids": torch.tensor(positions).long()}
                with torch.no_grad():
                    expected = theirs(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask), **given).logits.numpy()
                ours = tiny.outputs(model, jnp.asarray(tokens), jnp.asarray(mask), None if positions is None else jnp.asarray(positions))
                difference = np.abs(ours - expected)[mask == 1]
                print(f"{name}, {side}: {difference.max():.1e} of {np.abs(expected[mask == 1]).max():.1f}")
                assert np.abs(expected[mask == 1]).max() > 1
                assert difference.max() < TOLERANCE, side
