"""The learning-rate experiment: the rules' scales, its best rate on made-up losses, and its way from results to slopes."""

from __future__ import annotations

import math

import pytest

from experiments.lr_transfer import MEETING, RULES, SCALE, best_rate, draw, findings, members, settings
from lora_jax.tracking import MemberResult

RATES = [1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256]


@pytest.mark.parametrize("rank", [1, 8, 128])
def test_scales(rank):
    def scale(rule):
        own = settings(rule, rank)
        return own["adapter.alpha"] / (math.sqrt(rank) if own["adapter.rslora"] else rank)

    expected = [SCALE * MEETING / rank, SCALE * math.sqrt(MEETING / rank), SCALE]
    assert [scale(rule) for rule in RULES] == pytest.approx(expected)


def test_the_best_rate_lies_between_the_rates_of_the_grid():
    loss = lambda rate: (math.log(rate) - math.log(6e-3)) ** 2
    assert best_rate({rate: loss(rate) for rate in RATES}) == (pytest.approx(6e-3), True)
    assert best_rate({rate: rate for rate in RATES}) == (RATES[0], False)
    assert best_rate({1e-3: 0.5, 4e-3: 0.4, 1.6e-2: math.nan}) == (4e-3, True)
    assert best_rate(dict.fromkeys(RATES, math.nan)) == (None, False)


def test_slopes_of_made_up_losses(tmp_path):
    # The best rate of `constant` falls as 1 / rank here, which is what a rate that only counts times the scale would do.
    ranks = [4, 8, 16]
    results = []
    for point in members(ranks, RATES, 2):
        scale = point["adapter.alpha"] / (math.sqrt(point["adapter.rank"]) if point["adapter.rslora"] else point["adapter.rank"])
        wanted = 1e-2 * SCALE / scale * MEETING / point["adapter.rank"]
        loss = (math.log(point["optimizer.learning_rate"]) - math.log(wanted)) ** 2 + 0.1 * point["training.seed"]
        results.append(MemberResult(str(point), point, 1, "finished", {"loss": loss}))
    assert len(results) == (3 * 2 + 1) * len(RATES) * 2
    found = findings(results)
    assert [found["rules"][rule]["slope"] for rule in RULES] == pytest.approx([0, -0.5, -1])
    assert all(own["ranks"]["8"]["best_rate"] == pytest.approx(1e-2) for own in found["rules"].values())
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
