"""Examples, and their batches: one fixed shape with little padding, any of which can be made from its step number alone.

Every optimizer step sees exactly `batch_size` examples, and an epoch no example twice (what is left over after whole batches
is left out, other examples each time). Batches are balanced, so that their token totals are nearly equal, and examples are packed
several to a row: one small shape then holds every batch of the run, and the step is compiled once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .examples import NO_TARGET, Example, Examples, Painter, Scorer
from .order import balance, best_fit, epoch_order, rows_needed

# What other files take from here, too.
__all__ = ["NO_TARGET", "Batch", "BatchPlan", "Example", "Examples", "Painter", "Scorer"]

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
        decoder_length: that of a row of decoder tokens; 0 where there are none.
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
        self.rows, self._room, self.targets = self._choose_shape()
        self.length, self.decoder_length = self._room[0], self._room[1] if len(self._room) > 1 else 0

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
            `target_values` (accumulate, targets, width) float32 where values are predicted; for an encoder-decoder `decoder_tokens`,
            `decoder_segment_ids` and `decoder_positions`, (accumulate, rows, decoder_length) int32, into which targets then index.
            Where examples are several texts, each of which is a segment: `target_examples` and `target_roles`, (accumulate, targets)
            int32, whose target it is, and of which of its texts; and `example_weights`, (accumulate, examples) float32, 0 for filler.
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
        return self._train.take(np.unique(np.concatenate(groups)).tolist())

    @functools.cached_property
    def summary(self) -> dict[str, float]:
        """Figures for reports: `rows`, `length`, `tokens_per_step` (real ones), `padding_share` (of the positions computed on), and
        `dynamic_padding_share` (had each random batch been padded to its longest example)."""
        sizes = self._train.sizes
        order = epoch_order(len(sizes), seed=self._seed, epoch=0)[: self.steps_per_epoch * self._accumulate * self._micro]
        random = sizes[order].reshape(-1, self._micro, sizes.shape[1])
        return {
            "rows": self.rows,
            "length": self.length,
            "tokens_per_step": self._tokens_per_step,
            "padding_share": 1 - self._tokens_per_step / (self.rows * sum(self._room) * self._accumulate),
            "dynamic_padding_share": float(1 - random.sum() / (random.max(axis=1).sum() * self._micro)),
        }

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        """The micro-batches of an epoch, as arrays of example indices. Which examples a step has does not depend on their number."""
        like, count = epoch % DISTINCT_EPOCHS, self.steps_per_epoch
        lengths = self._train.sizes.sum(axis=1)
        order = epoch_order(len(lengths), seed=self._seed, epoch=like)[: count * self._accumulate * self._micro]
        steps = balance(order, lengths, count, seed=[self._seed, like])
        if like != epoch:
            again = np.random.default_rng(np.random.SeedSequence([self._seed, epoch])).permutation(count)
            steps = [steps[i] for i in again]
        if self._accumulate == 1:
            return steps
        cut = (balance(step, lengths, self._accumulate, seed=[self._seed, like, number]) for number, step in enumerate(steps))
        return [micro for step in cut for micro in step]

    def _choose_shape(self) -> tuple[int, tuple[int, ...], int]:
        """(rows, tokens of each kind that a row holds, targets) that hold every batch, with the least work."""
        sizes, targets = self._train.sizes, self._train.target_counts
        groups = np.concatenate([np.stack(self._epoch(e)) for e in range(self._distinct)])
        self._tokens_per_step = float(sizes[groups].sum()) / (self._distinct * self.steps_per_epoch)
        most = int(targets[groups].sum(axis=1).max())
        most = max(most, *(int(examples.target_counts.max()) for examples in self._evaluated))
        count = self._micro if self._per_example else int(_eights(most))
        longest = _eights(np.max([sizes.max(axis=0), *(examples.sizes.max(axis=0) for examples in self._evaluated)], axis=0))
        if not self._packed:
            return self._rounded(self._micro), tuple(longest.tolist()), count
        group_sizes = sizes[groups]
        # Longer rows pack better and attend more. One row never needs more than a whole batch's tokens.
        whole = np.maximum(longest, _eights(group_sizes.sum(axis=1).max(axis=0)))
        first, last = int(longest[0]), max(2 * int(longest[0]), 128)
        # For so many source tokens a row holds its share of target tokens.
        share = group_sizes.sum(axis=(0, 1)) / group_sizes[..., 0].sum()
        candidates = {
            tuple(np.minimum(np.maximum(_eights(np.ceil(n * share)), longest), whole).tolist()) for n in range(first, last + 1, 16)
        }
        shapes = [(self._rounded(int(rows_needed(group_sizes, room).max())), room) for room in sorted(candidates)]
        rows, room = min(shapes, key=lambda s: _work(*s))
        return rows, room, count

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._row_multiple) * self._row_multiple

    def eval_groups(self, examples: Examples | None = None) -> list[np.ndarray]:
        """Which examples are in each of `eval_batches`, cut so that they fit the shape; their targets stand there in this order."""
        examples = examples or self._held_out
        sizes, targets = examples.sizes, examples.target_counts
        lengths = sizes.sum(axis=1)
        order = np.arange(len(lengths))
        count = -(-len(lengths) // self._micro)
        while True:
            groups = balance(order, lengths, min(count, len(order)), seed=[0])
            if all(self._fits(sizes[g], targets[g]) for g in groups):
                return groups
            if count >= len(order):
                raise InputError("task: a held-out example is longer than the batches, whose length follows the training examples.")
            count = max(count + 1, round(count * 1.02))

    def _fits(self, sizes: np.ndarray, targets: np.ndarray) -> bool:
        if targets.sum() > self.targets or len(sizes) > self._micro or (sizes.max(axis=0) > self._room).any():
            return False
        return not self._packed or int(rows_needed(sizes[None], self._room)[0]) <= self.rows

    def _assemble(self, examples: Examples, group: Iterable[int]) -> Batch:
        """The arrays of one micro-batch."""
        chosen = [int(i) for i in group]
        part = examples.take(chosen)
        row_of = best_fit(part.sizes[None], self._room)[0] if self._packed else np.arange(len(chosen))
        batch, starts = _laid_out(part.tokens, row_of, (self.rows, self.length), part.texts)
        own = np.zeros_like(batch["tokens"]), np.full_like(batch["tokens"], self.targets)  # types, and whose a token is
        for n, (row, start) in enumerate(zip(row_of, starts, strict=True)):
            span = slice(start, start + len(part.tokens[n]))
            own[0][row, span], own[1][row, span] = 0 if part.types is None else part.types[n], n
        predicted = self.length  # tokens of a row, as targets count them
        if part.decoder_tokens is not None:
            predicted = self.decoder_length
            fed, starts = _laid_out(part.decoder_tokens, row_of, (self.rows, predicted))
            batch |= {f"decoder_{name}": array for name, array in fed.items()}
        wanted = [np.flatnonzero(targets != NO_TARGET) for targets in part.targets]
        index = np.concatenate([row * predicted + start + w for row, start, w in zip(row_of, starts, wanted, strict=True)])
        ids = np.concatenate([targets[w] for targets, w in zip(part.targets, wanted, strict=True)])
        filler = self.targets - len(index)
        batch |= {
            "target_index": np.pad(index, (0, filler)).astype(np.int32),
            "target_ids": np.pad(ids, (0, filler)).astype(np.int32),
            "target_weights": np.pad(np.ones(len(index), np.float32), (0, filler)),
        }
        if part.types is not None:
            batch["token_types"] = own[0]
        if part.values is not None:
            values = np.concatenate(part.values).astype(np.float32)
            batch["target_values"] = np.pad(values, [(0, filler)] + [(0, 0)] * (values.ndim - 1))
        if part.parts is not None:
            owner = np.repeat(np.arange(len(chosen)), [len(w) for w in wanted])
            roles = [p[np.searchsorted(p[:, 0], w, side="right") - 1, 1] for p, w in zip(part.parts, wanted, strict=True)]
            batch["target_examples"] = np.pad(owner, (0, filler)).astype(np.int32)
            batch["target_roles"] = np.pad(np.concatenate(roles), (0, filler)).astype(np.int32)
            batch["example_weights"] = np.pad(np.ones(len(chosen), np.float32), (0, self._micro - len(chosen)))
        return batch | {"example_ids": own[1]} if self._per_example else batch


def _laid_out(
    examples: Sequence[np.ndarray], row_of: np.ndarray, shape: tuple[int, int], texts: Callable[[int], list[slice]] | None = None
) -> tuple[Batch, list[int]]:
    """Tokens of examples one after the other in their rows: the arrays of `BatchPlan.batch` that say so, and where in its row each starts.

    Args:
        texts: where in an example's tokens each of its texts stands; by default each is one.
    """
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    used, inside = np.zeros(shape[0], int), np.zeros(shape[0], int)
    starts = []
    for n, (example, row) in enumerate(zip(examples, row_of, strict=True)):
        starts.append(int(used[row]))
        for text in [slice(0, len(example))] if texts is None else texts(n):
            inside[row] += 1
            span = slice(starts[-1] + text.start, starts[-1] + text.stop)
            tokens[row, span], segments[row, span], positions[row, span] = example[text], inside[row], np.arange(text.stop - text.start)
        used[row] += len(example)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}, starts


def _work(rows: int, room: tuple[int, ...]) -> float:
    """What rows with room for so many tokens of each kind cost; a kind attends to itself and to those before."""
    return sum(rows * n * (1 + sum(room[: kind + 1]) / _ATTENTION_LENGTH) for kind, n in enumerate(room))


def _eights(sizes: Any) -> Any:
    """Whole numbers, rounded up to multiples of 8."""
    return -(-np.asarray(sizes).astype(np.int64) // 8) * 8
