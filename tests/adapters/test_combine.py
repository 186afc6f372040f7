"""Combinations, against NumPy in float64 on the whole weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.combine import METHODS, Combination, best_product, factors_of, prune_random, prune_small
from lora_jax.adapters.inject import random_of
from lora_jax.adapters.partition import partition
from lora_jax.errors import InputError
from tests import tiny

DENSITY = {"density": 1.0}
WHOLE = {m: DENSITY if "density" in options else {} for m, options in METHODS.items()}


@pytest.fixture(scope="module")
def bank():
    """Adapters of other sites, layers, ranks and scales; `twin` is `wide` again."""
    base = tiny.decoder(3, tied=False)
    bank = AdapterBank(base)
    bank.add("wide", tiny.trained(base, 1, targets=["q_proj", "down_proj", "embed"], rank=3))
    bank.add("late", tiny.trained(base, 2, targets=["q_proj", "lm_head"], layers=None, rank=5, alpha=3.0))
    bank.add("last", tiny.trained(base, 3, targets=["q_proj"], layers=[0, 2], rank=2, rslora=True))
    bank.add("twin", bank.use("wide"))
    return bank


@pytest.fixture
def combine(bank):
    """`combine(weights, method=...)`: the changes of a combination that is then forgotten."""
    made = []

    def run(weights, **options):
        made.append(f"made {len(made)}")
        bank.combine(made[-1], weights, **options)
        return changes(bank, made[-1])

    yield run
    for name in made:
        bank.remove(name)


def factors(bank, name):
    return factors_of(bank.use(name))


def changes(bank, name):
    """Site name, layer counted from the top -> scale * A B (inputs, outputs) float64; only where it is not 0."""
    found = {}
    for site, f in factors(bank, name).items():
        whole = f.scale[:, None, None].astype(np.float64) * (f.a.astype(np.float64) @ f.b.astype(np.float64))
        found |= {(site, i - len(whole)): whole[i] for i in range(len(whole)) if f.scale[i] and whole[i].any()}
    return found


def summed(bank, weights):
    total = {}
    for name, weight in weights.items():
        for where, change in changes(bank, name).items():
            total[where] = total.get(where, 0) + weight * change
    return total


def assert_equal(got, wanted, tolerance=1e-6):
    assert got.keys() == wanted.keys()
    for where, change in wanted.items():
        assert tiny.relative(got[where], change) < tolerance, where


MIX = {"wide": 0.7, "late": -0.4, "last": 1.5}


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_and_cat_are_the_weighted_sum(bank, combine, method):
    wanted = summed(bank, MIX)
    assert_equal(combine(MIX, method=method), wanted)
    assert {where for where in wanted if where[0].endswith("q_proj")} == {("layers.attn.q_proj", i) for i in (-3, -2, -1)}


def test_the_ranks_of_linear_and_cat(bank):
    bank.combine("cat", MIX, method="cat")
    bank.combine("again", {"wide": 1.0, "twin": 0.5, "last": 1.0})
    try:
        cat, again = (factors(bank, n) for n in ("cat", "again"))
        assert cat["layers.attn.q_proj"].ranks.tolist() == [10, 8, 10]
        assert cat["lm_head"].ranks.tolist() == [5] and cat["layers.mlp.down_proj"].ranks.tolist() == [3, 3, 3]
        assert again["layers.attn.q_proj"].ranks.tolist() == [5, 3, 5]  # what `twin` adds lies in the span of `wide`
    finally:
        bank.remove("cat")
        bank.remove("again")


@pytest.mark.parametrize("method", METHODS)
def test_weight_1_of_one_adapter_is_that_adapter(bank, combine, method):
    for name in ("wide", "last"):
        assert_equal(combine({name: 1.0}, method=method, **WHOLE[method]), changes(bank, name))


@pytest.mark.parametrize("method", METHODS)
def test_negation_cancels(bank, combine, method):
    size = max(np.abs(c).max() for c in changes(bank, "wide").values())
    options = WHOLE[method] if method.startswith("dare") else {"density": 0.4} if WHOLE[method] else {}
    left = combine({"wide": 1.5, "twin": -1.5}, method=method, **options)
    assert max((np.abs(c).max() for c in left.values()), default=0.0) < 1e-6 * size
    whole = summed(bank, {"wide": -1.0})
    assert_equal(combine({"wide": -1.0}, method=method, **WHOLE[method]), whole)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_svd_is_the_best_approximation(bank, combine, rank):
    wanted, got = summed(bank, MIX), combine(MIX, method="svd", rank=rank)
    for where, whole in wanted.items():
        u, s, v = np.linalg.svd(whole)
        best = (u[:, :rank] * s[:rank]) @ v[:rank] if rank < len(s) else whole
        assert tiny.relative(got[where], best) < 1e-5
        # Eckart-Young: no matrix of this rank is nearer.
        assert np.linalg.norm(got[where] - whole) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-5, abs=1e-5 * s[0])
        assert np.linalg.matrix_rank(got[where], tol=1e-5 * s[0]) <= rank


def test_the_default_rank_is_the_largest_combined(bank):
    bank.combine("svd", MIX, method="svd")
    try:
        found = factors(bank, "svd")
        assert found["layers.attn.q_proj"].ranks.tolist() == [5, 5, 5]
        assert found["layers.mlp.down_proj"].ranks.tolist() == [3, 3, 3] and found["lm_head"].ranks.tolist() == [5]
    finally:
        bank.remove("svd")


def test_svd_of_a_large_weight_never_makes_it():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300_000, 4)), rng.standard_normal((4, 300_000))  # 720 GB as a whole
    left, right = best_product(a.astype(np.float32), b.astype(np.float32), 2)
    assert left.shape == (300_000, 2) and right.shape == (2, 300_000)
    np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-10)
    core = np.linalg.svd(np.linalg.qr(a)[1] @ np.linalg.qr(b.T)[1].T)[1]
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), core[:2], rtol=1e-5)


def _ties_entry(values, weights, majority):
    """The formula of one entry, as a reader of the paper would write it."""
    vote = sum(values) if majority == "total" else sum(np.sign(v) for v in values)
    sign = 1 if vote >= 0 else -1
    agreeing = [w * v for v, w in zip(values, weights) if np.sign(v) == sign]
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_entry_by_entry(majority):
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal((6, 5)).astype(np.float32) for n in "abc"}
    weights = {"a": 0.5, "b": 2.0, "c": -1.0}
    got = Combination("ties", weights, density=0.6, majority=majority).changes(given, "w")
    trimmed = []
    for whole in given.values():
        limit = np.sort(np.abs(whole).ravel())[-18]  # 0.6 of 30 entries are kept
        trimmed.append(np.where(np.abs(whole) >= limit, whole, 0))
    for i, j in itertools.product(range(6), range(5)):
        wanted = _ties_entry([t[i, j] for t in trimmed], list(weights.values()), majority)
        assert got[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    other = Combination("ties", weights, density=0.6, majority={"total": "frequency", "frequency": "total"}[majority])
    assert not np.allclose(got, other.changes(given, "w"))


def test_magnitude_prune_keeps_the_largest_entries(bank, combine):
    got = combine({"wide": 2.0}, method="magnitude_prune", density=0.25, rank=64)
    for where, whole in changes(bank, "wide").items():
        kept = int(0.25 * whole.size)
        limit = np.sort(np.abs(whole).ravel())[-kept]
        assert tiny.relative(got[where], np.where(np.abs(whole) >= limit, 2 * whole, 0)) < 1e-5
    assert (prune_small(np.ones((4, 4), np.float32), 0.5) != 0).sum() == 8  # equal entries: still so many


def test_dare_keeps_entries_at_random_and_scales_them_up():
    whole = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32)
    pruned = prune_random(whole, 0.3, random_of(0, "a/w", 0))
    kept = pruned != 0
    np.testing.assert_allclose(pruned[kept], whole[kept] / np.float32(0.3), rtol=1e-6)
    assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / whole.size)
    rows, columns = kept.mean(1), kept.mean(0)
    assert abs(rows.std() - np.sqrt(0.21 / 300)) < 0.005 and abs(columns.std() - np.sqrt(0.21 / 400)) < 0.005


def test_what_dare_keeps_depends_on_seed_adapter_site_and_layer_alone(combine):
    options = {"method": "dare_linear", "density": 0.5, "rank": 64}
    alone, again, other = (combine({"wide": 1.0}, **options, **seed) for seed in ({}, {"seed": 0}, {"seed": 1}))
    assert_equal(alone, again, 1e-12)
    where, deeper = ("layers.attn.q_proj", -1), ("layers.attn.q_proj", -2)
    assert tiny.relative(other[where], alone[where]) > 0.1
    assert not np.array_equal(np.abs(alone[where]) > 1e-6, np.abs(alone[deeper]) > 1e-6)
    # In company the same entries of it are kept: what is left when the other's share is taken off is what was there alone.
    both, late = combine({"late": 1.0, "wide": 1.0}, **options), combine({"late": 1.0}, **options)
    assert tiny.relative(both[where] - late[where], alone[where]) < 1e-4


def test_trained_weights_are_combined_as_their_changes():
    base = tiny.classifier(1)
    bank = AdapterBank(base)
    for seed, name in enumerate(["a", "b"]):
        adapted = tiny.trained(base, seed, targets=["q_proj"], bias="all")
        rng = np.random.default_rng(seed)
        for variable in (adapted.classifier.kernel, adapted.base.embed_norm.bias):
            variable[...] = variable[...] + rng.standard_normal(variable.shape).astype(np.float32)
        bank.add(name, adapted)
    bank.combine("sum", {"a": 0.5, "b": 0.25})
    bank.combine("ties", {"a": 0.5, "b": 0.25}, method="ties", density=0.5)
    parts = {n: partition(bank.use(n)).trainable for n in bank.names}
    whole = {n: np.asarray(a) for n, a in partition(tiny.trained(base, 0, targets=["q_proj"], bias="all")).trainable.items()}
    for name in ("classifier.kernel", "base.embed_norm.bias"):
        given = {n: np.asarray(parts[n][name]) - whole[name] for n in "ab"}
        np.testing.assert_allclose(parts["sum"][name], whole[name] + 0.5 * given["a"] + 0.25 * given["b"], rtol=1e-5, atol=1e-6)
        ties = Combination("ties", {"a": 0.5, "b": 0.25}, density=0.5).changes(given, name)
        np.testing.assert_allclose(parts["ties"][name], whole[name] + ties, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bank.use("sum").base.pooler.kernel[...], base.base.pooler.kernel[...])


BAD = {
    "method 'tie'": ({"method": "tie"}, "Did you mean 'ties'"),
    "no density": ({"method": "ties"}, "'ties' needs a density above 0 and at most 1, got None"),
    "density 0": ({"method": "dare_linear", "density": 0.0}, "got 0.0"),
    "a density too many": ({"method": "svd", "density": 0.5}, "'svd' does not take density, which belongs to ties, dare_linear"),
    "a rank too many": ({"method": "cat", "rank": 4}, "'cat' does not take rank"),
    "a seed too many": (
        {"method": "ties", "density": 0.5, "seed": 1},
        "'ties' does not take seed, which belongs to dare_linear",
    ),
    "rank 0": ({"method": "svd", "rank": 0}, "rank must be at least 1"),
    "majority": ({"method": "ties", "density": 0.5, "majority": "totl"}, "Did you mean 'total'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(bank, case):
    options, message = BAD[case]
    names = bank.names
    with pytest.raises(InputError, match=message):
        bank.combine("new", {"wide": 1.0}, **options)
    assert bank.names == names


def test_bad_weights_and_names(bank):
    for name, weights, message in (
        ("new", {"wde": 1.0}, "no adapter 'wde' in the bank. Did you mean 'wide'"),
        ("new", {}, "no adapters to combine"),
        ("new", {"wide": float("nan")}, "weight of 'wide' is nan"),
        ("late", {"wide": 1.0}, "'late' is in the bank already"),
    ):
        with pytest.raises(InputError, match=message):
            bank.combine(name, weights)
