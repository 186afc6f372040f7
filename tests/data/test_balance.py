"""Orders are seeded permutations, and balancing loses no example and levels the totals."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batching import DATA_ORDER
from lora_jax.data.order import balance, epoch_order


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed=seed, epoch=epoch).tolist()) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(40, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9  # in particular, epoch 1 of seed 0 is not epoch 0 of seed 1
    assert epoch_order(40, seed=1, epoch=2).tolist() == epoch_order(40, seed=1, epoch=2).tolist()
    # Pinned: another order needs another DATA_ORDER, for half-trained runs cannot go on in it.
    assert DATA_ORDER == 2 and epoch_order(8, seed=3, epoch=1).tolist() == [2, 1, 4, 0, 5, 7, 6, 3]


@settings(deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.data())
def test_every_example_is_in_one_batch_and_sizes_differ_by_at_most_one(lengths, data):
    groups = balance(np.arange(len(lengths)), np.array(lengths), data.draw(st.integers(1, len(lengths))), seed=[0])
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    sizes = [len(g) for g in groups]
    assert max(sizes) - min(sizes) <= 1


def test_totals_are_level_where_random_groups_are_not():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 65, 1600)
    order = rng.permutation(1600)
    random = lengths[order].reshape(50, 32).sum(axis=1)
    balanced = np.array([lengths[g].sum() for g in balance(order, lengths, 50, seed=[0])])
    assert np.ptp(balanced) <= 5 < np.ptp(random) / 10


def test_groups_come_in_an_order_that_has_nothing_to_do_with_length():
    lengths = np.arange(1, 201)
    firsts = [int(lengths[g].max()) for g in balance(np.arange(200), lengths, 20, seed=[0])]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
