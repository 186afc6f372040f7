"""Kept activations: what enters the layers above the cut, for each example, found by the example's tokens.

An example's activations depend on its own tokens (and which of two texts each is of) alone, whatever shares its row and its batch, so that
a batch of any composition is put together from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from ..data.examples import Examples


def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, bytes]]:
    """The examples of a batch: where each starts and stops in the flattened tokens, and its tokens (and their types) as bytes.

    >>> batch = {"tokens": np.array([[7, 8, 9, 0]], np.int32), "segment_ids": np.array([[1, 1, 2, 0]], np.int32)}
    >>> [(start, stop) for start, stop, _ in spans(batch)]
    [(0, 2), (2, 3)]
    """
    tokens, segments = batch["tokens"].reshape(-1), batch["segment_ids"].reshape(-1)
    types = batch["token_types"].reshape(-1) if "token_types" in batch else None
    begins = np.ones(segments.size + 1, bool)
    begins[1:-1] = segments[1:] != segments[:-1]
    begins[:: batch["tokens"].shape[-1]] = True
    bounds = np.flatnonzero(begins)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if segments[start]:
            yield start, stop, _name(tokens[start:stop], None if types is None else types[start:stop])


def _name(tokens: np.ndarray, types: np.ndarray | None) -> bytes:
    parts = [tokens] if types is None else [tokens, types]
    return b"".join(np.asarray(part, np.int32).tobytes() for part in parts)


class PrefixStore:
    """The activations of some examples.

    Args:
        examples: equal ones are kept once.
        width: numbers a token.
        dtype: of the numbers.

    Attributes:
        tokens: how many are kept, padding not counted.
        pairs: whether the examples are pairs of texts.
        nbytes: size of the activations.
        hits, misses: batches that were put together from it, and that could not be.
    """

    def __init__(self, examples: Examples, width: int, dtype: np.dtype):
        self._where: dict[bytes, int] = {}
        self.tokens = 0
        self.pairs = examples.types is not None
        for tokens, types in zip(examples.tokens, examples.types or itertools.repeat(None)):
            name = _name(tokens, types)
            if name not in self._where:
                self._where[name] = self.tokens
                self.tokens += len(tokens)
        self.width, self.dtype = width, np.dtype(dtype)
        self.nbytes = self.tokens * width * self.dtype.itemsize
        self.hits = self.misses = 0
        self._rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, width) of the activations."""
        return self.tokens, self.width

    def names(self) -> Iterator[bytes]:
        """The examples as bytes, in the order they are kept in."""
        return iter(self._where)

    def use(self, rows: np.ndarray) -> None:
        """Keeps the activations in (or reads them from) an array of `shape`, of numbers as wide as `dtype`."""
        assert rows.shape == self.shape
        self._rows = rows.view(self.dtype)

    def put(self, batch: Mapping[str, np.ndarray], prefix: np.ndarray) -> None:
        """Takes the activations of a batch's examples, (..., rows, length, width)."""
        assert self._rows is not None
        flat = prefix.reshape(-1, self.width)
        for start, stop, name in spans(batch):
            at = self._where.get(name)
            if at is not None:
                self._rows[at : at + stop - start] = flat[start:stop]

    def get(self, batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """(..., rows, length, width): a batch's activations, 0 at padding; None if an example of it is not kept."""
        assert self._rows is not None
        flat = np.zeros((batch["tokens"].size, self.width), self.dtype)
        for start, stop, name in spans(batch):
            at = self._where.get(name)
            if at is None:
                self.misses += 1
                return None
            flat[start:stop] = self._rows[at : at + stop - start]
        self.hits += 1
        return flat.reshape(*batch["tokens"].shape, self.width)
