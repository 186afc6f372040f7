"""Examples of a task over texts, tokenised; and the names by which what is computed of a text is kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..weights.provenance import arrays_digest
from .prompts import Prompts
from .store import counts_of, lengths_of

NO_TARGET = -1

# What was answered at each example's targets, in order -> metric -> value: a number, or an array (`TaskMetrics.tables`).
Scorer = Callable[[Sequence[np.ndarray]], dict[str, Any]]
# The same answers shown with a few of the examples: a PNG.
Painter = Callable[[Sequence[np.ndarray]], bytes]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        tokens: (length,) int32; of an encoder-decoder the source.
        targets: (length,) int32, of an encoder-decoder as long as `decoder_tokens`: the token, class or place to be predicted at that
            position, or -1. Where values are to be predicted, any other number marks the positions.
        types: (length,) int32, 1 in the second text of a pair; None where there is one text.
        values: (targets, width) float32, what is to be predicted at each position with a target, in order; None where ids are.
        parts: (parts, 2) int32, where each text of an example of several begins, and its role among them (0, 1, ...; its task says what
            each is). None of the texts sees another. None where an example is one text. Examples of several weigh 1 each in the loss,
            however many targets they have; of others each target does.
        cut: whether the row had more tokens.
        end_cut: whether something was to be predicted of those.
        decoder_tokens: (target length,) int32, what an encoder-decoder's decoder is given; None where there is one sequence.
    """

    tokens: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None
    values: np.ndarray | None = None
    parts: np.ndarray | None = None
    cut: bool = False
    end_cut: bool = False
    decoder_tokens: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: a (length,) int32 array for each.
        targets: a (length,) int32 array for each: the token or class to be predicted at that position, or -1.
        types: a (length,) int32 array for each, 1 in the second text of a pair; None where no example is one.
        score: the task's own metrics; None where evaluators compute all.
        values: a (targets, width) float32 array for each; None where ids are predicted.
        prompts: what is decoded when a model is evaluated on these; None where nothing is.
        decoder_tokens: a (target length,) int32 array for each, to which the targets belong; None where no encoder-decoder sees them.
        parts: a (parts, 2) int32 array for each, as in `Example`; None where each is one text.
        picture: shows answers; None where there is nothing to see.
    """

    tokens: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    types: list[np.ndarray] | None = None
    score: Scorer | None = None
    values: list[np.ndarray] | None = None
    prompts: Prompts | None = None
    decoder_tokens: Sequence[np.ndarray] | None = None
    parts: list[np.ndarray] | None = None
    picture: Painter | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], score: Scorer | None = None, prompts: Prompts | None = None) -> Examples:
        """Those of a list, all with types (or values, decoder tokens, parts) or all without."""
        types = [e.types for e in examples if e.types is not None]
        values = [e.values for e in examples if e.values is not None]
        fed = [e.decoder_tokens for e in examples if e.decoder_tokens is not None]
        parts = [e.parts for e in examples if e.parts is not None]
        columns = [e.tokens for e in examples], [e.targets for e in examples]
        return cls(*columns, types or None, score, values or None, prompts, fed or None, parts or None)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """16 hex digits of all that is learned of."""
        # Examples that are one text each are digested as they were before there were others.
        more = [column for column in (self.decoder_tokens, self.parts) if column is not None]
        return arrays_digest([self.tokens, self.targets, self.types, self.values, *more])

    @property
    def varies(self) -> bool:
        """Whether a training step sees an example otherwise than the step of another epoch."""
        return False

    @staticmethod
    def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, bytes]]:
        """Where each text of a batch starts and stops in the flattened positions, and its name."""
        return spans(batch)

    def named(self) -> Iterator[tuple[bytes, int]]:
        """Of every text the same name, and how many tokens it has."""
        for i, tokens in enumerate(self.tokens):
            types = None if self.types is None else self.types[i]
            for text in self.texts(i):
                yield _name(tokens[text], None if types is None else types[text]), text.stop - text.start

    def take(self, chosen: Sequence[int]) -> Examples:
        """The examples at these indices, without what scores them all."""

        def own(column: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
            return None if column is None else [column[i] for i in chosen]

        tokens, targets = ([column[i] for i in chosen] for column in (self.tokens, self.targets))
        values, fed, parts = own(self.values), own(self.decoder_tokens), own(self.parts)
        return Examples(tokens, targets, own(self.types), values=values, decoder_tokens=fed, parts=parts)

    def texts(self, index: int) -> list[slice]:
        """Where in an example's tokens each of its texts stands."""
        starts = [0] if self.parts is None else self.parts[index][:, 0].tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(self.tokens[index])])]

    @functools.cached_property
    def longest_text(self) -> int:
        """Tokens of the longest text: positions count from the start of a text."""
        if self.parts is None:
            return int(self.sizes.max())
        return max(text.stop - text.start for i in range(len(self.tokens)) for text in self.texts(i))

    def wanted(self, index: int) -> np.ndarray:
        """What is to be predicted at an example's targets, in order: (targets,) int32 ids, or (targets, width) float32 values."""
        targets = self.targets[index]
        return targets[targets != NO_TARGET] if self.values is None else self.values[index]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each."""
        return lengths_of(self.tokens)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(n, kinds) int64: the tokens of each, and the decoder's in a second column where there are any."""
        columns = [self.tokens, *(() if self.decoder_tokens is None else (self.decoder_tokens,))]
        return np.stack([lengths_of(tokens) for tokens in columns], axis=1)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) int64 positions of each that have a target."""
        return counts_of(self.targets, NO_TARGET)


def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, bytes]]:
    """The texts of a batch: where each starts and stops in the flattened tokens, and its tokens (and their types) as bytes.

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
