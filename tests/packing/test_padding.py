"""Who trains with whom: few packs, and little padding in them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lora_jax.config.load import with_values
from lora_jax.packing.cost import PackShapes
from lora_jax.packing.planner import Weights, cut_by_weight, cut_evenly
from lora_jax.training.setup import set_up


def weights(ranks, firsts=None, *, base=1000.0, layer=0.0, slope=1.0, depth=4):
    """Members at one site of a stack of `depth` layers."""
    firsts = np.zeros(len(ranks), int) if firsts is None else np.array(firsts)
    table = base + layer * np.arange(depth, -1, -1.0)
    return Weights(table, np.array([slope]), np.array([True]), np.array(ranks)[:, None], firsts)


def cut(chosen, largest=16, *, most_padding=0.25, steps=10**12, platform="cpu"):
    return cut_by_weight(chosen, largest, most_padding=most_padding, steps=steps, platform=platform)


def test_ranks_are_cheap_next_to_the_base():
    assert cut(weights([2, 4, 8, 16] * 2)) == [[*range(8)]]


def test_ranks_that_are_not_cheap_go_apart():
    """Without a base at all: 1 with 64 would be half padding."""
    assert cut(weights([64, 1, 64, 1], base=0)) == [[0, 2], [1, 3]]
    assert cut(weights([64, 1, 64, 1], base=0), most_padding=0.6) == [[0, 1, 2, 3]]
    assert cut(weights([3, 3, 4, 4], base=0), most_padding=0.0) == [[0, 1], [2, 3]]


def test_layers_weigh_more_than_ranks():
    chosen = weights([8, 8, 64, 64], [0, 3, 0, 3], layer=1000.0, base=0)
    assert cut(chosen) == [[0, 2], [1, 3]]


def test_sites_that_are_not_shared_part_members():
    """Two sets of sites, any rank: a site is read and written however low its rank, so one pack for each set wastes least."""
    ranks = np.array([[1, 0], [0, 1], [16, 0], [0, 16], [2, 0], [0, 2]])
    chosen = Weights(np.full(5, 200.0), np.ones(2), np.ones(2, bool), ranks, np.zeros(6, int))
    by_rank, by_site = [[0, 1, 4, 5], [2, 3]], [[0, 2, 4], [1, 3, 5]]
    assert cut(chosen) == by_rank  # by the arithmetic of ranks alone
    assert cut(dataclasses.replace(chosen, site=40.0)) == by_site
    assert cut(dataclasses.replace(chosen, site=40.0), most_padding=0.6) == [[*range(6)]]


def test_what_costs_less_than_compiling_is_left_together():
    chosen = weights([64, 1, 64, 1], base=0)
    assert cut(chosen, steps=10) == [[0, 1, 2, 3]]
    assert cut(chosen, steps=10**10) == [[0, 2], [1, 3]]
    assert cut(chosen, steps=10**10, platform="gpu") == [[0, 1, 2, 3]]  # it does the same in no time, and compiles as long


def test_equal_members_are_cut_evenly_and_keep_their_order():
    assert cut_evenly(10, 4) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]] or sorted(map(len, cut_evenly(10, 4))) == [3, 3, 4]
    packs = cut(weights([4] * 10), 4)
    assert sorted(map(len, packs)) == [3, 3, 4] and [i for p in packs for i in p] == [*range(10)]


def test_no_cut_is_better():
    """Against all cuts of the sorted members: as few packs, and of those the least arithmetic."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        count = int(rng.integers(2, 8))
        chosen = weights(rng.integers(1, 65, count), rng.integers(0, 4, count), base=50.0, layer=float(rng.integers(0, 100)))
        share, largest = float(rng.uniform(0, 0.5)), int(rng.integers(1, 5))
        packs = cut(chosen, largest, most_padding=share)
        assert sorted(i for p in packs for i in p) == [*range(count)]
        order = np.lexsort((chosen.alone, -chosen.firsts)).tolist()

        def cost(packs, chosen=chosen):
            return len(packs), sum(len(p) * chosen.packed(np.array(p))[-1] for p in packs)

        fair = [
            parts
            for cuts in itertools.product([False, True], repeat=count - 1)
            for parts in [_split(order, cuts)]
            if all(len(p) <= largest and (len(p) == 1 or chosen.padding(p) <= share + 1e-6) for p in parts)
        ]
        assert cost(packs)[0] == min(map(cost, fair))[0]
        assert cost(packs)[1] == pytest.approx(min(map(cost, fair))[1])
        assert all(len(p) == 1 or chosen.padding(p) <= share + 1e-6 for p in packs)


def _split(order, cuts):
    parts = [[order[0]]]
    for index, here in zip(order[1:], cuts, strict=True):
        if here:
            parts.append([])
        parts[-1].append(index)
    return parts


@pytest.mark.slow
def test_weights_are_those_of_the_real_step(hub, tmp_path):
    """Of members alone and of a pack, against the traced step."""
    base = hub.config(tmp_path)
    setup = set_up(base)
    changes = [
        {"rank": 4, "targets": ["q_proj", "v_proj"]},
        {"rank": 16, "targets": "mlp", "layers": "last:1"},
        {"rank": 2, "targets": "all-linear", "layers": "last:2"},
        {"rank": 3, "targets": "all-linear"},
    ]
    configs = [with_values(base, {f"adapter.{k}": v for k, v in c.items()}) for c in changes]
    told = Weights.of(setup, configs)
    assert told is not None and np.all(told.site > 0)
    told = dataclasses.replace(told, site=0.0)  # arithmetic alone can be counted
    assert told.firsts.tolist() == [0, 2, 1, 0]
    real = [PackShapes(setup, [c]).member_flops for c in configs]
    assert told.alone == pytest.approx(real, rel=0.08)
    for members in ([1, 2], [0, 1, 2, 3]):
        # A little less is differentiated where the lowest site is high up in its layer.
        packed = PackShapes(setup, [configs[i] for i in members]).member_flops
        assert told.packed(np.array(members))[-1] == pytest.approx(packed, rel=0.12)
        assert told.padding(members) == pytest.approx(1 - sum(real[i] for i in members) / (len(members) * packed), abs=0.05)


def test_nothing_to_weigh(hub, tmp_path):
    base = hub.config(tmp_path)
    same = [with_values(base, {"training.seed": i, "adapter.alpha": 1.0 + i}) for i in range(3)]
    assert Weights.of(set_up(base), same) is None
