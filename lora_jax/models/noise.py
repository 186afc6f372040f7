"""Random numbers for dropout that belong to a position of the batch, in whatever order, and on whatever devices, it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

from ..parallel.constraints import take_positions

_targets: ContextVar[tuple[jax.Array, tuple[int, ...]] | None] = ContextVar("targets", default=None)


@contextlib.contextmanager
def positions_of_targets(index: jax.Array, shape: tuple[int, ...]) -> Iterator[None]:
    """Inside, an activation of as many rows as there are targets is one at these positions.

    Args:
        index: (n,) int32, into the flattened batch.
        shape: (rows, length) of the batch.
    """
    token = _targets.set((index, shape))
    try:
        yield
    finally:
        _targets.reset(token)


def uniform(key: jax.Array, x: jax.Array) -> jax.Array:
    """Float32 numbers in [0, 1) of the shape of `x`; at the targets' positions those that all positions would get."""
    targets = _targets.get()
    if targets is None or x.ndim != 2 or x.shape[0] != targets[0].shape[0]:
        return jax.random.uniform(key, x.shape)
    index, shape = targets
    return take_positions(jax.random.uniform(key, (*shape, x.shape[-1])), index)
