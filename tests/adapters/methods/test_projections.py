"""VeRA, LoRA-XS, TinyLoRA and RandLoRA: their equations, how they start, and what their own keys do."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.adapters.draws import singular_vectors, torch_uniform
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.errors import InputError
from tests import tiny
from tests.adapters.methods import exact


def test_the_equation_of_vera():
    def change(a: exact.Arrays, _: np.ndarray) -> np.ndarray:
        return a["vera_a"] * a["lambda_d"] @ a["vera_b"] * a["lambda_b"]

    exact.check(change, method="vera", rank=3)


def test_the_equation_of_lora_xs():
    def change(a: exact.Arrays, weight: np.ndarray) -> np.ndarray:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        signs = np.sign((u[:, :3] * a["frozen_a"]).sum(0))  # singular vectors are unique up to their sign
        return 6 / 3 * (u[:, :3] * signs) @ a["middle"] @ ((signs * s[:3])[:, None] * v[:3])

    exact.check(change, method="lora_xs", rank=3, alpha=6)


def test_the_equation_of_tinylora():
    def change(a: exact.Arrays, weight: np.ndarray) -> np.ndarray:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        middle = np.einsum("u,urq->rq", a["v"], a["projections"])
        signs = np.sign((u[:, :2] * a["frozen_a"]).sum(0))  # singular vectors are unique up to their sign
        root = np.sqrt(s[:2])
        return (u[:, :2] * signs * root) @ middle @ ((signs * root)[:, None] * v[:2])

    exact.check(change, method="tinylora", rank=2, u=5)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 8), (8, 12), (9, 9)])
def test_the_equation_of_randlora(inputs, outputs):
    """As PEFT flattens: the smaller base's products rank by rank, the larger one's base by base."""

    def change(a: exact.Arrays, _: np.ndarray) -> np.ndarray:
        small = np.stack([g * lam[r] * a["randlora_a"][r] for r in range(3) for lam, g in zip(a["randlora_lambda"].T, a["randlora_gamma"])])
        large = a["randlora_b"].reshape(max(inputs, outputs), -1)
        product = 6 / 3 * large @ small  # (larger, smaller)
        return product.T if inputs <= outputs else product

    exact.check(change, inputs, outputs, method="randlora", rank=3, alpha=6)


def test_singular_vectors_have_one_sign_and_make_the_weight():
    weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    u, s, v = singular_vectors(weight)
    assert tiny.relative((u * s) @ v, weight) < 1e-6
    assert (u[np.abs(u).argmax(0), range(5)] > 0).all()
    assert singular_vectors(weight)[0] is u  # the members of a sweep share them


def test_numbers_of_a_mersenne_twister_as_pytorch_draws_them():
    """The first four of `torch.empty(4).uniform_(-1, 1, generator=torch.Generator().manual_seed(7))`, read off PyTorch 2.13."""
    (found,) = torch_uniform(7, [(4,)], [1.0])
    np.testing.assert_allclose(found, [0.0698, -0.6024, 0.3184, 0.3138], atol=1e-3)


@pytest.mark.parametrize(
    ("method", "key", "values", "array"),
    [
        ("vera", "d_initial", (0.1, 0.5), "lambda_d"),
        ("vera", "projection_seed", (0, 1), "vera_a"),
        ("randlora", "projection_seed", (0, 1), "randlora_b"),
        ("lora_xs", "init_std", (0.0, 1e-5), "middle"),
        ("tinylora", "init_v_bound", (0.0, 0.02), "v"),
        ("tinylora", "u", (4, 5), "projections"),
    ],
)
def test_a_key_changes_the_start(method, key, values, array):
    one, two = (np.asarray(getattr(exact.start(method=method, rank=2, **{key: value}), array)[...]) for value in values)
    assert one.shape != two.shape or np.abs(one - two).max() > 0


def test_a_seed_of_the_projections_is_the_same_for_every_seed_of_training():
    one, two = (np.asarray(exact.start(method="vera", rank=2, projection_seed=3, seed=seed).vera_a[...]) for seed in (1, 2))
    assert np.array_equal(one, two)
    one, two = (np.asarray(exact.start(method="vera", rank=2, seed=seed).vera_a[...]) for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_vera_shares_one_pair_of_matrices_of_the_largest_sites():
    adapted = inject(
        tiny.encoder(2), tiny.adapter(method="vera", rank=3, targets=["q_proj", "up_proj", "down_proj"]), rngs=tiny.nnx.Rngs(0)
    )
    sites = list(site_modules(adapted).values())
    assert len(sites) == 3 and len({id(site.vera_a) for site in sites}) == 1
    assert sites[0].vera_a.shape == (64, 3) and sites[0].vera_b.shape == (3, 64)


def test_tied_vectors_are_one_array():
    adapted = inject(
        tiny.encoder(2), tiny.adapter(method="tinylora", rank=2, u=4, weight_tying=1, targets="attention"), rngs=tiny.nnx.Rngs(0)
    )
    sites = list(site_modules(adapted).values())
    assert len({id(site.v) for site in sites}) == 1 and sites[0].v.shape == (4,)


@pytest.mark.parametrize("method", ["lora_xs", "tinylora"])
def test_a_rank_beyond_the_singular_vectors_is_refused(method):
    with pytest.raises(InputError, match=r"adapter\.rank.*32 singular vectors"):
        resolve(tiny.encoder(1), tiny.adapter(method=method, rank=40, targets=["q_proj"]))
