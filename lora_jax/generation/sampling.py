"""Sampling: the next token from its logits, greedy, at a temperature, from the top k, from the nucleus (top p).

The order is that of transformers: temperature, top k, then top p of what is left. A draw is the argmax of logits plus Gumbel noise, which
has the softmax's distribution (the Gumbel-max trick). Each row draws from its own seed and its own count of tokens, so that what a row
says depends on no other row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import InputError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the largest (greedy).
        top_k: only so many of the largest logits are drawn from; None: all.
        top_p: only the likeliest tokens that together have this probability are (the one that reaches it too); None: all.
            (Nucleus sampling, arXiv:1904.09751.)

    Raises:
        InputError: a number out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: must be at least 0 and finite, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p: must be above 0 and at most 1, got {self.top_p}.")

    @property
    def method(self) -> str:
        """`greedy`, `plain`, or `filtered`: each compiles to its own program; the numbers in it are data."""
        if self.temperature == 0.0:
            return "greedy"
        return "plain" if self.top_k is None and self.top_p is None else "filtered"

    def params(self, vocab: int) -> SamplingParams:
        """As arrays, for logits of `vocab` tokens."""
        top_k = vocab if self.top_k is None else min(self.top_k, vocab)
        return SamplingParams(jnp.float32(self.temperature), jnp.int32(top_k), jnp.float32(1.0 if self.top_p is None else self.top_p))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The numbers of `Sampling` as scalars () of a compiled program: float32, int32, float32."""

    temperature: Array
    top_k: Array
    top_p: Array


def choose(method: str, logits: Array, params: SamplingParams, seeds: Array, count: Array) -> Array:
    """The next token of each row, (rows,) int32.

    Args:
        method: of `Sampling`; static.
        logits: (rows, vocab).
        seeds: (rows,) uint32.
        count: () int32, how many tokens were chosen before.
    """
    logits = logits.astype(jnp.float32)
    if method == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / params.temperature
    if method == "filtered":
        scaled = filtered(scaled, params.top_k, params.top_p)

    def draw(seed: Array, row: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jnp.argmax(row + jax.random.gumbel(key, row.shape)).astype(jnp.int32)

    return jax.vmap(draw)(seeds, scaled)


def filtered(scaled: Array, top_k: Array, top_p: Array) -> Array:
    """Top-k and top-p filtering: logits (rows, vocab) with those of excluded tokens set to -inf.

    Equal logits are kept or excluded together.
    """
    ordered = -jnp.sort(-scaled, axis=-1)
    ordered = jnp.where(jnp.arange(ordered.shape[-1]) < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_nucleus = (before < top_p) & (ordered > -jnp.inf)
    last = jnp.min(jnp.where(in_nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def row_seeds(seed: int | Sequence[int], rows: int) -> Any:
    """(rows,) uint32: the seeds given, or from one seed on for each row the next.

    Raises:
        InputError: there are not as many seeds as rows.
    """
    seeds = [seed + i for i in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise InputError(f"seed: {len(seeds)} seeds for {rows} prompts.")
    return jnp.asarray([s % 2**32 for s in seeds], jnp.uint32)
