"""Every decoder family through a few packed steps: two members that differ in rank and targets, packed rows, labels on some tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax.config.doors import FAMILIES
from lora_jax.models.heads import LanguageModel
from lora_jax.packing.pack import Pack
from tests import tiny

MOE = ("mixtral", "qwen3_moe")
# Those that are least like each other; the others are for `make test-long`.
SLOW = ("gemma2", "gpt2")
DECODERS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.long)
    for name, family in FAMILIES.all().items()
    if family.kind == "decoder"
]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def losses(model, members) -> np.ndarray:
    """(steps, members), of training on one batch again and again."""
    pack, batch = Pack.build(model, [tiny.config(**m) for m in members], STEPS), tiny.batch(causal=True)
    state, found = pack.state, []
    for step in range(STEPS):
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(step))
        found.append(jax.device_get(metrics.loss))
    pack.programs.check()
    return np.stack(found)


@pytest.mark.parametrize("family", DECODERS)
def test_a_pack_learns(family):
    """From the same loss, the base's; and where there are experts, the member on them as it does alone."""
    members = [
        {"adapter__rank": 2, "adapter__targets": "attention", "adapter__layers": "last:1"},
        {"adapter__rank": 4, "adapter__targets": "experts" if family in MOE else "mlp", "training__seed": 1},
    ]
    model = LanguageModel(tiny.decoder_of(family))
    packed = losses(model, members)
    assert np.isfinite(packed).all() and (packed[-1] < packed[0] - 1e-3).all()
    np.testing.assert_allclose(packed[0, 0], packed[0, 1], rtol=1e-5)
    if family in MOE:
        np.testing.assert_allclose(losses(model, members[1:])[:, 0], packed[:, 1], rtol=1e-5)
