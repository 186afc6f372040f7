"""How tokens are drawn, against a NumPy reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.generation.sampling import Sampling, choose, filtered, row_seeds

VOCAB, DRAWS = 12, 4000


def reference(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Each token's probability: temperature, then the k best, then the nucleus, one token after the other, in float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)[: sampling.top_k]
    shares = np.exp(scaled[order] - scaled.max())
    shares /= shares.sum()
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if sampling.top_p is not None and total >= sampling.top_p:
            break
        kept.append(token)
        total += share
    out = np.zeros(len(logits))
    out[kept] = np.exp(scaled[kept] - scaled.max())
    return out / out.sum()


CASES = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.7, top_k=4),
    Sampling(0.9, top_p=0.7),
    Sampling(1.2, top_k=5, top_p=0.8),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_p=1e-6),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_have_the_references_distribution(sampling):
    logits = np.random.default_rng(3).normal(0, 2, VOCAB).astype(np.float32)
    expected = reference(logits, sampling)
    run = jax.jit(choose, static_argnums=0)
    rows = jnp.broadcast_to(logits, (DRAWS, VOCAB))
    drawn = np.asarray(run(sampling.method, rows, sampling.params(VOCAB), row_seeds(7, DRAWS), jnp.int32(0)))
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[expected == 0].any(), "a token was drawn that is filtered out"
    seen = expected > 0
    chi2 = float(((counts[seen] - DRAWS * expected[seen]) ** 2 / (DRAWS * expected[seen])).sum())
    freedom = max(1, int(seen.sum()) - 1)
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4, (chi2, freedom)
    # The draws of one row, over its count of tokens, have it too.
    if sampling.method == "plain":
        counted = jax.jit(jax.vmap(lambda n: choose("plain", rows[:1], sampling.params(VOCAB), row_seeds(1, 1), n)[0]))
        more = np.bincount(np.asarray(counted(jnp.arange(DRAWS))), minlength=VOCAB)
        assert float(((more - DRAWS * expected) ** 2 / (DRAWS * expected)).sum()) < freedom + 4 * np.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("sampling", [c for c in CASES if c.method == "filtered"], ids=str)
def test_what_is_left_equals_the_reference_for_many_rows(sampling):
    logits = np.random.default_rng(5).normal(0, 3, (50, VOCAB)).astype(np.float32)
    numbers = sampling.params(VOCAB)
    got = np.asarray(jax.nn.softmax(filtered(logits / numbers.temperature, numbers.top_k, numbers.top_p), axis=-1))
    np.testing.assert_allclose(got, [reference(row, sampling) for row in logits], atol=1e-6)


def test_greedy_takes_the_largest():
    logits = np.random.default_rng(0).normal(0, 1, (5, VOCAB)).astype(np.float32)
    got = choose("greedy", jnp.asarray(logits), Sampling().params(VOCAB), row_seeds(0, 5), jnp.int32(0))
    np.testing.assert_array_equal(got, logits.argmax(1))


def test_methods_and_seeds():
    assert [s.method for s in (Sampling(), Sampling(0.5), Sampling(1.0, 3), Sampling(1.0, None, 0.5))] == [
        "greedy",
        "plain",
        "filtered",
        "filtered",
    ]
    assert row_seeds(5, 3).tolist() == [5, 6, 7] and row_seeds([9, 1], 2).tolist() == [9, 1]
    assert row_seeds(-1, 1).tolist() == [2**32 - 1]
    with pytest.raises(InputError, match="2 seeds for 3 prompts"):
        row_seeds([1, 2], 3)


@pytest.mark.parametrize("values, word", [((-1.0,), "temperature"), ((float("nan"),), "temperature"), ((1.0, 0), "top_k"),
                                          ((1.0, None, 0.0), "top_p"), ((1.0, None, 1.5), "top_p")])  # fmt: skip
def test_numbers_out_of_range_are_refused(values, word):
    with pytest.raises(InputError, match=word):
        Sampling(*values)
