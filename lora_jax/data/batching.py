"""Examples, and their batches: one fixed shape with little padding, any of which can be made from its step number alone.

Every optimizer step sees exactly `batch_size` examples, and an epoch no example twice (what is left over after whole batches
is left out, other examples each time). Batches are balanced, so that their token totals are nearly equal, and examples are packed
several to a row: one small shape then holds every batch of the run, and the step is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .prompts import Prompts

NO_TARGET = -1

# What was answered at each example's targets, in order -> metric -> value: a number, or an array (`TaskMetrics.tables`).
Scorer = Callable[[Sequence[np.ndarray]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        tokens: (length,) int32.
        targets: (length,) int32, the token, class or place to be predicted at that position, or -1. Where values are to be predicted,
            any other number marks the positions.
        types: (length,) int32, 1 in the second text of a pair; None where there is one text.
        values: (targets, width) float32, what is to be predicted at each position with a target, in order; None where ids are.
        cut: whether the row had more tokens.
        end_cut: whether something was to be predicted of those.
    """

    tokens: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None
    values: np.ndarray | None = None
    cut: bool = False
    end_cut: bool = False


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
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    types: list[np.ndarray] | None = None
    score: Scorer | None = None
    values: list[np.ndarray] | None = None
    prompts: Prompts | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], score: Scorer | None = None, prompts: Prompts | None = None) -> Examples:
        """Those of a list, all with types (or values) or all without."""
        types = [e.types for e in examples if e.types is not None]
        values = [e.values for e in examples if e.values is not None]
        return cls([e.tokens for e in examples], [e.targets for e in examples], types or None, score, values or None, prompts)

    def wanted(self, index: int) -> np.ndarray:
        """What is to be predicted at an example's targets, in order: (targets,) int32 ids, or (targets, width) float32 values."""
        targets = self.targets[index]
        return targets[targets != NO_TARGET] if self.values is None else self.values[index]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each."""
        return np.array([len(t) for t in self.tokens], np.int64)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) int64 positions of each that have a target."""
        return np.array([int((t != NO_TARGET).sum()) for t in self.targets], np.int64)


Batch = dict[str, np.ndarray]

# Of the order that `BatchPlan` gives the examples. A change to it changes which batch each step sees: it then takes the next number, and
# runs that were half-way are refused.
DATA_ORDER = 2
# The same where a step has several micro-batches: up to 2, a step's examples depended on their number.
ACCUMULATED_ORDER = 3

# After so many epochs the batches' members come again (in another order): each epoch that is unlike the others has to be looked at
# before the first step, to know the shape that holds them all.
DISTINCT_EPOCHS = 64
# Attention costs as much as the other matmuls together at about this many tokens a row.
_ATTENTION_LENGTH = 2000


class BatchPlan:
    """The batches of a run.

    Args:
        train: examples to train on.
        held_out: examples to evaluate on; their batches have the same shapes.
        batch_size: examples in an optimizer step.
        accumulate: micro-batches in a step; divides `batch_size`.
        batching: `packed` (several examples a row) or `padded` (one).
        seed: of the order.
        per_example: whether each example has one target, so that `example_ids` are wanted.
        row_multiple: rows are rounded up to a multiple of it, so that devices can share them.
        steps: optimizer steps; or `epochs`, from which they follow.
        extra_steps: beyond those.
        test: more examples to evaluate on.

    Attributes:
        order: number of the order that the examples are in (`DATA_ORDER`, `ACCUMULATED_ORDER`).
        rows, length: shape of a micro-batch's tokens.
        targets: size of its target arrays.
        steps, steps_per_epoch: optimizer steps in all, and in one pass over the data.

    Raises:
        InputError: fewer training examples than `batch_size`.
    """

    def __init__(
        self,
        train: Examples,
        held_out: Examples,
        *,
        batch_size: int,
        accumulate: int = 1,
        batching: str = "packed",
        seed: int = 0,
        per_example: bool,
        row_multiple: int = 1,
        steps: int | None = None,
        epochs: float | None = None,
        extra_steps: int = 0,
        test: Examples | None = None,
    ):
        if batch_size > len(train.tokens):
            raise InputError(f"training.batch_size: {batch_size}, but there are only {len(train.tokens)} training examples.")
        self._train, self._held_out, self._seed, self._per_example = train, held_out, seed, per_example
        self._row_multiple, self._evaluated = row_multiple, (held_out, *(() if test is None else (test,)))
        self._micro, self._accumulate, self._packed = batch_size // accumulate, accumulate, batching == "packed"
        self.order = DATA_ORDER if accumulate == 1 else ACCUMULATED_ORDER
        self.steps_per_epoch = len(train.tokens) // batch_size
        self.steps = steps if steps is not None else max(1, round((epochs or 0) * self.steps_per_epoch))
        self.steps += extra_steps
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._distinct = min(DISTINCT_EPOCHS, -(-self.steps // self.steps_per_epoch))
        self.rows, self.length, self.targets = self._choose_shape()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (exclusive), made ahead in the background."""
        import grain  # slow to import, and only a run needs it

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        yield from grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)

    def batch(self, step: int) -> Batch:
        """The batch of a 0-based step: arrays with a leading micro-batch axis.

        Returns:
            `tokens`, `segment_ids` (0 is padding, then 1, 2, ... along a row), `positions`: (accumulate, rows, length) int32;
            `target_index` (into the flattened rows * length), `target_ids`: (accumulate, targets) int32; `target_weights`:
            (accumulate, targets) float32, 0 for filler; and `example_ids` (accumulate, rows, length) int32 where each example has
            one target: whose example a token is, `targets` for padding; `token_types` of the same shape where examples are pairs;
            `target_values` (accumulate, targets, width) float32 where values are predicted.
        """
        epoch, within = divmod(int(step), self.steps_per_epoch)
        groups = self._epoch(epoch)[within * self._accumulate : (within + 1) * self._accumulate]
        micros = [self._assemble(self._train, g) for g in groups]
        return {name: np.stack([m[name] for m in micros]) for name in micros[0]}

    def eval_batches(self, examples: Examples | None = None) -> list[Batch]:
        """Every held-out example (or those given) exactly once, in the shapes of a micro-batch, without the micro axis."""
        return [self._assemble(examples or self._held_out, g) for g in self.eval_groups(examples)]

    @property
    def micro_batch(self) -> int:
        """Examples of a micro-batch."""
        return self._micro

    def seen(self) -> Examples:
        """The training examples that the run's batches hold, each once, in the order of the data."""
        whole, rest = divmod(self.steps, self.steps_per_epoch)
        groups = [group for epoch in range(min(whole, DISTINCT_EPOCHS)) for group in self._epoch(epoch)]
        groups += self._epoch(whole)[: rest * self._accumulate]
        chosen = np.unique(np.concatenate(groups)).tolist()
        types = self._train.types
        own = None if types is None else [types[i] for i in chosen]
        values = None if self._train.values is None else [self._train.values[i] for i in chosen]
        return Examples([self._train.tokens[i] for i in chosen], [self._train.targets[i] for i in chosen], own, values=values)

    @functools.cached_property
    def summary(self) -> dict[str, float]:
        """Figures for reports: `rows`, `length`, `tokens_per_step` (real ones), `padding_share` (of the positions computed on), and
        `dynamic_padding_share` (had each random batch been padded to its longest example)."""
        lengths = self._train.lengths
        order = epoch_order(len(lengths), seed=self._seed, epoch=0)[: self.steps_per_epoch * self._accumulate * self._micro]
        random = lengths[order].reshape(-1, self._micro)
        return {
            "rows": self.rows,
            "length": self.length,
            "tokens_per_step": self._tokens_per_step,
            "padding_share": 1 - self._tokens_per_step / (self.rows * self.length * self._accumulate),
            "dynamic_padding_share": float(1 - random.sum() / (random.max(axis=1).sum() * self._micro)),
        }

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        """The micro-batches of an epoch, as arrays of example indices. Which examples a step has does not depend on their number."""
        like, count = epoch % DISTINCT_EPOCHS, self.steps_per_epoch
        lengths = self._train.lengths
        order = epoch_order(len(lengths), seed=self._seed, epoch=like)[: count * self._accumulate * self._micro]
        steps = balance(order, lengths, count, seed=[self._seed, like])
        if like != epoch:
            again = np.random.default_rng(np.random.SeedSequence([self._seed, epoch])).permutation(count)
            steps = [steps[i] for i in again]
        if self._accumulate == 1:
            return steps
        cut = (balance(step, lengths, self._accumulate, seed=[self._seed, like, number]) for number, step in enumerate(steps))
        return [micro for step in cut for micro in step]

    def _choose_shape(self) -> tuple[int, int, int]:
        """(rows, length, targets) that hold every batch, with the least work."""
        lengths, targets = self._train.lengths, self._train.target_counts
        groups = np.concatenate([np.stack(self._epoch(e)) for e in range(self._distinct)])
        self._tokens_per_step = float(lengths[groups].sum()) / (self._distinct * self.steps_per_epoch)
        most = int(targets[groups].sum(axis=1).max())
        most = max(most, *(int(examples.target_counts.max()) for examples in self._evaluated))
        count = self._micro if self._per_example else -(-most // 8) * 8
        longest = -(-int(max(lengths.max(), *(examples.lengths.max() for examples in self._evaluated))) // 8) * 8
        if not self._packed:
            return self._rounded(self._micro), longest, count
        group_lengths = lengths[groups]
        # Longer rows pack better and attend more. One row never needs more than a whole batch's tokens.
        whole = max(longest, -(-int(group_lengths.sum(axis=1).max()) // 8) * 8)
        candidates = {min(n, whole) for n in range(longest, max(2 * longest, 128) + 1, 16)}
        shapes = [(self._rounded(int(rows_needed(group_lengths, n).max())), n) for n in sorted(candidates)]
        rows, length = min(shapes, key=lambda s: s[0] * s[1] * (1 + s[1] / _ATTENTION_LENGTH))
        return rows, length, count

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._row_multiple) * self._row_multiple

    def eval_groups(self, examples: Examples | None = None) -> list[np.ndarray]:
        """Which examples are in each of `eval_batches`, cut so that they fit the shape; their targets stand there in this order."""
        examples = examples or self._held_out
        lengths, targets = examples.lengths, examples.target_counts
        order = np.arange(len(lengths))
        count = -(-len(lengths) // self._micro)
        while True:
            groups = balance(order, lengths, min(count, len(order)), seed=[0])
            if all(self._fits(lengths[g], targets[g]) for g in groups):
                return groups
            if count >= len(order):
                raise InputError("task: a held-out example is longer than the batches, whose length follows the training examples.")
            count = max(count + 1, round(count * 1.02))

    def _fits(self, lengths: np.ndarray, targets: np.ndarray) -> bool:
        if targets.sum() > self.targets or len(lengths) > self._micro or lengths.max() > self.length:
            return False
        return not self._packed or int(rows_needed(lengths[None], self.length)[0]) <= self.rows

    def _assemble(self, examples: Examples, group: Iterable[int]) -> Batch:
        """The arrays of one micro-batch."""
        chosen = [int(i) for i in group]
        lengths = np.array([len(examples.tokens[i]) for i in chosen])
        row_of = best_fit(lengths[None], self.length)[0] if self._packed else np.arange(len(chosen))
        shape = (self.rows, self.length)
        tokens, segments, positions, types = (np.zeros(shape, np.int32) for _ in range(4))
        example_ids = np.full(shape, self.targets, np.int32)
        used, inside = np.zeros(self.rows, int), np.zeros(self.rows, int)
        index: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        for n, (i, row) in enumerate(zip(chosen, row_of, strict=True)):
            at, size = used[row], len(examples.tokens[i])
            span = slice(at, at + size)
            inside[row] += 1
            tokens[row, span], segments[row, span], positions[row, span] = examples.tokens[i], inside[row], np.arange(size)
            example_ids[row, span] = n
            if examples.types is not None:
                types[row, span] = examples.types[i]
            wanted = np.flatnonzero(examples.targets[i] != NO_TARGET)
            index.append(row * self.length + at + wanted)
            ids.append(examples.targets[i][wanted])
            used[row] += size
        flat_index, flat_ids = np.concatenate(index), np.concatenate(ids)
        filler = self.targets - len(flat_index)
        batch = {
            "tokens": tokens,
            "segment_ids": segments,
            "positions": positions,
            "target_index": np.pad(flat_index, (0, filler)).astype(np.int32),
            "target_ids": np.pad(flat_ids, (0, filler)).astype(np.int32),
            "target_weights": np.pad(np.ones(len(flat_index), np.float32), (0, filler)),
        }
        if examples.types is not None:
            batch["token_types"] = types
        if examples.values is not None:
            values = np.concatenate([examples.values[i] for i in chosen]).astype(np.float32)
            batch["target_values"] = np.pad(values, [(0, filler)] + [(0, 0)] * (values.ndim - 1))
        return batch | {"example_ids": example_ids} if self._per_example else batch


def rows_needed(group_lengths: np.ndarray, length: int) -> np.ndarray:
    """How many rows of `length` best-fit-decreasing needs for each of many groups at once.

    Args:
        group_lengths: (groups, size) int tokens of each group's examples, 0 where a group has fewer.
        length: tokens a row holds; at least the longest example.

    Returns:
        (groups,) int64.

    >>> rows_needed(np.array([[5, 4, 3, 2], [8, 0, 0, 0]]), 8)
    array([2, 1])
    """
    return best_fit(group_lengths, length).max(axis=1, initial=-1) + 1


def best_fit(group_lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each example when each group is packed by best-fit-decreasing; (groups, size) int64, -1 where the length is 0.

    Longest first, each example goes to the fullest row that still has room, the first such row where several are equal.

    >>> best_fit(np.array([[5, 4, 3, 2]]), 8)
    array([[0, 1, 0, 1]])
    """
    groups, size = group_lengths.shape
    every = np.arange(groups)
    order = np.argsort(-group_lengths, axis=1, kind="stable")
    free = np.full((groups, size), length, dtype=np.int64)
    rows = np.full((groups, size), -1, dtype=np.int64)
    opened = 0  # rows beyond the ones opened anywhere need no look
    for rank in range(size):
        example = order[:, rank]
        need = group_lengths[every, example]
        room = free[:, : opened + 1]
        row = np.argmin(np.where(room >= need[:, None], room, length + 1), axis=1)
        placed = need > 0
        rows[every[placed], example[placed]] = row[placed]
        free[every[placed], row[placed]] -= need[placed]
        opened = min(size - 1, max(opened, int(row[placed].max(initial=-1)) + 1))
    return rows


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The seeded permutation of `range(count)` for one epoch, (count,) int64; another epoch gives another one.

    >>> sorted(epoch_order(4, seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(count)


def balance(order: np.ndarray, lengths: np.ndarray, batches: int, *, seed: list[int]) -> list[np.ndarray]:
    """Splits the examples `order` into `batches` groups whose sizes differ by at most one and whose token totals are nearly equal.

    The examples are sorted by length (ties in the order given) and cut into strata of `batches`; each group gets one of each
    stratum, the longest stratum first, the stratum's longest going to the group with the fewest tokens so far. The groups
    come back in a seeded order.

    Args:
        order: (n,) indices of examples, in a seeded order.
        lengths: tokens of every example, indexed by the values of `order`.
        batches: how many groups.
        seed: of the order of the groups and of ties between them.

    >>> [sorted(group.tolist()) for group in balance(np.arange(4), np.array([9, 1, 8, 2]), 2, seed=[0])]
    [[2, 3], [0, 1]]
    """
    rng = np.random.default_rng(seed)
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    groups = np.full((batches, -(-len(order) // batches)), -1, dtype=np.int64)
    totals = np.zeros(batches, dtype=np.int64)
    for column in range(groups.shape[1]):
        stratum = by_length[column * batches : (column + 1) * batches]
        # Fewest tokens first; groups with equal totals are taken in random order. (The last stratum may be short.)
        takers = np.lexsort((rng.random(batches), totals))[: len(stratum)]
        groups[takers, column] = stratum
        totals[takers] += lengths[stratum]
    return [groups[g][groups[g] >= 0] for g in rng.permutation(batches)]
