"""Which examples share a batch: seeded, and dealt so that every batch holds nearly the same number of tokens.

Equal totals are what lets one small fixed shape hold every batch of a run.
"""

from __future__ import annotations

import numpy as np


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The seeded permutation of `range(count)` for one epoch, (count,) int64; another epoch gives another one.

    >>> sorted(epoch_order(4, seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    import grain  # slow to import, and only a run needs it

    # grain itself seeds epoch e with seed + e, which would make seed 1 a copy of seed 0 one epoch late: mix them instead.
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    shuffled = grain.MapDataset.range(count).shuffle(seed=mixed)
    # By index: iterating starts grain's prefetching machinery, which costs milliseconds an element.
    return np.fromiter((shuffled[i] for i in range(count)), dtype=np.int64, count=count)


def deal(order: np.ndarray, lengths: np.ndarray, batches: int, *, seed: list[int]) -> list[np.ndarray]:
    """Deal the examples `order` into `batches` groups whose sizes differ by at most one and whose token totals are nearly equal.

    The examples are sorted by length (ties in the order given) and cut into strata of `batches`; each group gets one of each
    stratum, the longest stratum first, the stratum's longest going to the group with the fewest tokens so far. The groups
    come back in a seeded order.

    Args:
        order: (n,) indices of examples, in a seeded order.
        lengths: tokens of every example, indexed by the values of `order`.
        batches: how many groups.
        seed: of the order of the groups and of ties between them.

    >>> [sorted(group.tolist()) for group in deal(np.arange(4), np.array([9, 1, 8, 2]), 2, seed=[0])]
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
