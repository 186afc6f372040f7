"""Where in the batch the rows of a gathered activation are: a model's top computes a few positions and leaves the others out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_targets: ContextVar[tuple[jax.Array, tuple[int, ...]] | None] = ContextVar("targets", default=None)


@contextlib.contextmanager
def positions_of_targets(index: jax.Array | None, shape: tuple[int, ...]) -> Iterator[None]:
    """Inside, an activation of as many rows as there are targets is one at these positions.

    Args:
        index: (n,) int32, into the flattened batch; None changes nothing.
        shape: (rows, length) of the batch.
    """
    token = _targets.set(_targets.get() if index is None else (index, shape))
    try:
        yield
    finally:
        _targets.reset(token)


def targets_of(x: jax.Array) -> tuple[jax.Array, tuple[int, ...]] | None:
    """The positions and the batch's shape, as in `positions_of_targets`, of a gathered `x` (n, width); None where it is all positions."""
    targets = _targets.get()
    return None if targets is None or x.ndim != 2 or x.shape[0] != targets[0].shape[0] else targets
