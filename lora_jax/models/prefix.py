"""What the layers below the lowest cut of a stack come to: taken out of a model that runs, or put into one in their place.

Nothing above the cut is needed for it, and where nothing below the cut is trained it is the same for every member of a pack and in
every epoch. A model knows nothing of this: `common` stands in the stack, and whoever runs the model says what it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

_given: ContextVar[jax.Array | None] = ContextVar("given", default=None)
_taken: ContextVar[list[jax.Array] | None] = ContextVar("taken", default=None)


@contextlib.contextmanager
def starting_from(prefix: jax.Array | None) -> Iterator[None]:
    """Inside, a model starts at its cut.

    Args:
        prefix: (rows, length, width), what enters the layers above the cut; None: the model runs from its tokens on.
    """
    token = _given.set(prefix)
    try:
        yield
    finally:
        _given.reset(token)


def prefix_of(run: Callable[[], object]) -> jax.Array:
    """(rows, length, width): what enters the layers above the cut of a model that `run` runs.

    Whatever `run` computes beyond it is not used, so that a compiled program has no trace of it.

    Raises:
        ValueError: no stack of the model is cut.
    """
    token = _taken.set([])
    try:
        run()
        taken = _taken.get()
    finally:
        _taken.reset(token)
    if not taken:
        raise ValueError("the model has no cut: all its layers are one segment")
    return taken[0]


def common(below: Callable[[], jax.Array]) -> jax.Array:
    """The outcome of the layers below a cut: what `starting_from` gave, or else what `below()` computes."""
    given = _given.get()
    x = below() if given is None else given
    taken = _taken.get()
    if taken is not None:
        taken.append(x)
    return x
