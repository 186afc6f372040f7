"""OFT against its equation in float64, and where PEFT's own ways show."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merged_arrays
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

INPUTS, OUTPUTS = 24, 10


def site_of(seed: int = 0, **options: Any) -> Any:
    """A linear layer with OFT, its numbers away from 0."""
    net = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(seed)))
    config = tiny.adapter(method="oft", rank=6, targets="all-linear", **options)
    (site,) = site_modules(inject(net, config, rngs=nnx.Rngs(1))).values()
    site.skew.set_value(jnp.asarray(0.2 * np.random.default_rng(seed).standard_normal(site.skew.shape), jnp.float32))
    return site


def rotation(skew: np.ndarray, terms: int | None) -> np.ndarray:
    """R of one block's rows, by the definition; terms None: the inverse, as PEFT has it."""
    q = np.triu(skew, 1) - np.triu(skew, 1).T
    eye = np.eye(len(q))
    if terms is None:
        return (eye - q) @ np.linalg.inv(eye + q)
    if terms == 2:
        return eye + 2 * q
    series = sum((np.linalg.matrix_power(q, k) for k in range(1, max(terms, 4) - 1)), eye)
    return (eye + q) @ series


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7, None])
@pytest.mark.parametrize("share", [False, True])
def test_it_computes_what_the_equation_says(terms: int | None, share: bool) -> None:
    options: dict[str, Any] = {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms}
    site = site_of(**options, block_share=share)
    skew, kernel, bias = (np.asarray(v[...], np.float64) for v in (site.skew, site.base.kernel, site.base.bias))
    x = np.random.default_rng(2).standard_normal((5, INPUTS))
    blocks = [rotation(skew[:6] if share else skew[6 * i : 6 * i + 6], terms) for i in range(4)]
    turned = np.concatenate([x[:, 6 * i : 6 * i + 6] @ block for i, block in enumerate(blocks)], 1)
    expected = turned @ kernel + bias
    assert tiny.relative(site(jnp.asarray(x, jnp.float32)), expected) < 1e-5
    weight, _ = merged_arrays(site)
    assert tiny.relative(x @ np.asarray(weight) + bias, expected) < 1e-5


def test_the_series_nears_a_rotation_and_the_inverse_is_one() -> None:
    site = site_of(use_cayley_neumann=False)
    r = np.asarray(site.method.change(site)) + np.eye(6)
    np.testing.assert_allclose(r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(6), r.shape), atol=1e-5)
    # PEFT's two forms turn opposite ways: the series is of (I + Q)(I - Q)^-1.
    series = site_of(num_cayley_neumann_terms=40)
    np.testing.assert_allclose(np.asarray(series.method.change(series)) + np.eye(6), r.swapaxes(-1, -2), atol=1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_coft_keeps_each_block_within_its_bound(share: bool) -> None:
    site = site_of(coft=True, eps=0.1, block_share=share)
    bound = 0.1 if share else 0.1 / np.sqrt(4)
    rows = np.asarray(site.method.projected(site.skew[...], site.block[...], site.eps[...]), np.float64)
    for block in rows.reshape(-1, 6, 6):
        assert np.linalg.norm(np.triu(block, 1) - np.triu(block, 1).T) == pytest.approx(bound, rel=1e-5)
    expected = site.method.change(site)
    site.skew.set_value(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(site.method.change(site), expected, atol=1e-6)
    small = 1e-3 * site.skew[...]
    np.testing.assert_allclose(site.method.projected(small, site.block[...], site.eps[...]), small, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(o, marks=pytest.mark.long)
            for o in ({"block_share": True}, {"use_cayley_neumann": False}, {"coft": True, "eps": 0.05})
        ),
    ],
    ids=str,
)
def test_blocks_of_4_and_6_share_a_pack(options: dict[str, Any]) -> None:
    """Neither size is a multiple of the other, and one member has both; each equals its solo run."""
    model = tiny.classifier(2, width=48)
    adapters = [{"rank": 4}, {"rank": 6}, {"rank": 4, "rank_pattern": {"1.attn.v_proj": 12}}]
    common = {"method": "oft", "targets": ["q_proj", "v_proj"], **options}
    configs = [tiny.config(**{f"adapter__{k}": v for k, v in (common | a).items()}, optimizer__eps=1e-3) for a in adapters]

    def run(chosen: list[Any]) -> tuple[Pack, np.ndarray, Any]:
        pack, losses = Pack.build(model, chosen, 5), []
        state = pack.state
        for step in range(5):
            state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, tiny.batch(step), np.int32(step))
            losses.append(np.asarray(metrics.loss))
        return pack, np.stack(losses), jax.tree.map(np.asarray, state.trainable)

    pack, losses, arrays = run(configs)
    heads = 48 * 3 + 3
    shared = 1 if options.get("block_share") else 0
    numbers = {b: b * (b - 1) // 2 * (1 if shared else 48 // b) for b in (4, 6, 12)}
    assert [pack.parameter_count(k) - heads for k in range(3)] == [4 * numbers[4], 4 * numbers[6], 3 * numbers[4] + numbers[12]]
    for k, config in enumerate(configs):
        alone, curve, own = run([config])
        assert tiny.relative(losses[:, k], curve[:, 0]) < 1e-5
        mine, wanted = pack.member_arrays(model, k, arrays), alone.member_arrays(model, 0, own)
        for name, array in wanted.items():
            assert tiny.relative(mine[name], array) < 1e-4, name


def test_what_it_cannot_do_is_said() -> None:
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.rank: blocks of 6 .* 32 inputs of layers\.attn\.q_proj.*4 and 8"):
        resolve(model, tiny.adapter(method="oft", rank=6, targets=["q_proj"]))
    with pytest.raises(InputError, match=r"adapter\.rank"):
        resolve(model, tiny.adapter(method="oft", rank=1, targets=["q_proj"]))
    with pytest.raises(InputError, match=r"adapter\.targets.*embed"):
        resolve(model, tiny.adapter(method="oft", targets="embedding"))
    with pytest.raises(InputError, match=r"adapter\.dropout"):
        resolve(model, tiny.adapter(method="oft", targets=["q_proj"], dropout=0.1))
