"""The planted-rank experiment: its rule on made-up losses, and the committed figures against that rule."""

import json
from pathlib import Path

import pytest

from experiments.planted_rank import PLANTED_LAYERS, RANKS, elbow

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "planted_rank.json"


@pytest.mark.parametrize("planted", RANKS[1:])
def test_the_elbow_is_where_the_loss_falls_most(planted):
    # Below the planted rank a share of the update is out of reach; above it the loss goes on falling, by less.
    losses = {rank: max(1 - rank / planted, 0.01 / rank) for rank in RANKS}
    assert elbow(losses) == planted
    assert elbow({rank: 2.0**-i for i, rank in enumerate(RANKS)} | {16: 0.001}) == 16


def test_the_committed_figures_say_what_is_claimed():
    teachers = json.loads(RESULTS.read_text())["teachers"]
    assert sorted((t["planted_rank"], t["seed"]) for t in teachers) == [(rank, seed) for rank in (2, 4, 8) for seed in range(5)]
    for teacher in teachers:
        assert elbow({int(rank): loss for rank, loss in teacher["loss_by_rank"].items()}) == teacher["planted_rank"] == teacher["elbow"]
        best = min(teacher["loss_by_layers"], key=teacher["loss_by_layers"].get)
        assert len(teacher["loss_by_layers"]) == 6 and [int(i) for i in best.split(",")] == PLANTED_LAYERS
