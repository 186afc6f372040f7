"""Ranks and scales of each layer, and the layout that holds several members."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.adapters.layout import resolve, unite
from lora_jax.errors import InputError
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.encoder(4)


def _one(model, **values):
    return resolve(model, tiny.adapter(**({"rank": 4, "alpha": 6.0, "targets": ["q_proj"]} | values)))


def test_scale_is_alpha_over_rank_or_its_root(model):
    assert _one(model).sites["layers.attn.q_proj"].settings["scale"].tolist() == [1.5] * 4
    assert _one(model, rslora=True).sites["layers.attn.q_proj"].settings["scale"].tolist() == [3.0] * 4


def test_patterns_give_ranks_and_alphas_of_their_own(model):
    spec = _one(
        model,
        targets=["q_proj", "v_proj"],
        rank_pattern={r"layers\.[01]\.attn\.q_proj": 2, "value": 8},
        alpha_pattern={r"3\.attn\.q_proj": 4.0},
    )
    q, v = spec.sites["layers.attn.q_proj"], spec.sites["layers.attn.v_proj"]
    assert q.ranks.tolist() == [2, 2, 4, 4] and q.settings["scale"].tolist() == [3.0, 3.0, 1.5, 1.0]
    assert v.ranks.tolist() == [8] * 4 and v.settings["scale"].tolist() == [0.75] * 4
    rooted = _one(model, rank_pattern={"q_proj": 9}, rslora=True)
    assert rooted.sites["layers.attn.q_proj"].settings["scale"].tolist() == [2.0] * 4


def test_the_first_pattern_that_matches_decides(model):
    spec = _one(model, rank_pattern={r"0\.attn\.q_proj": 2, "q_proj": 3})
    assert spec.sites["layers.attn.q_proj"].ranks.tolist() == [2, 3, 3, 3]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_an_error(model, key):
    with pytest.raises(InputError, match=rf"adapter\.{key}: 'k_proj' matches no adapted module.*layers\.attn\.q_proj"):
        _one(model, **{key: {"k_proj": 2}})
    with pytest.raises(InputError, match="'proj'"):  # an end cut at a dot, as in targets
        _one(model, **{key: {"proj": 2}})


def test_layout_is_the_smallest_that_holds_all(model):
    members = [
        _one(model, layers="last:2", rank=2),
        _one(model, layers=[1], rank=8, targets=["up_proj"]),
        _one(model, layers=[3], dropout=0.1),
    ]
    layout = unite(model, members)
    shapes = {s.site.name: (s.first, s.rank, s.layers) for s in layout.sites}
    assert shapes == {"layers.attn.q_proj": (1, 4, 3), "layers.mlp.up_proj": (1, 8, 3)}
    assert layout.dropout and not unite(model, members[:2]).dropout


def test_a_single_weight_starts_at_0(model):
    layout = unite(model, [_one(model, targets=["pooler", "embed", "q_proj"], layers=None), _one(model, layers="last:1")])
    assert {s.site.name: (s.first, s.layers) for s in layout.sites} == {
        "embed": (0, None),
        "pooler": (0, None),
        "layers.attn.q_proj": (0, 4),
    }


def test_members_must_agree_in_what_is_static(model):
    for other in ({"bias": "all"}, {"modules_to_save": ["pooler"]}, {"method": "full"}):
        with pytest.raises(ValueError, match="members differ"):
            unite(model, [_one(model), _one(model, **other)])


def test_baselines_have_no_sites(model):
    assert not _one(model, method="full").sites and not unite(model, [_one(model, method="head")]).sites


def test_rank_0_where_a_layer_is_left_out(model):
    site = _one(model, layers=[1, 2]).sites["layers.attn.q_proj"]
    np.testing.assert_array_equal(site.ranks, [0, 4, 4, 0])
    np.testing.assert_array_equal(site.settings["scale"], [0, 1.5, 1.5, 0])
