"""AdaLoRA: the update, the penalty, and the steps of the budget, against the paper in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merged_arrays
from lora_jax.adapters.parameters import SiteArrays
from lora_jax.config.doors import METHODS
from lora_jax.errors import InputError
from tests import tiny

METHOD = METHODS.get("adalora", "adapter.method")
RANK, STEPS = 4, 12  # the padded rank; steps in all
SCHEDULE = {"target_r": 1, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.85, "beta2": 0.7, "orth_reg_weight": 0.5}


def test_it_is_the_papers_equation():
    layer = nnx.Linear(13, 11, rngs=nnx.Rngs(0))
    config = tiny.adapter(method="adalora", rank=3, target_r=2, alpha=5.0, targets="all-linear")
    (module,) = site_modules(inject(nnx.Sequential(layer), config, rngs=nnx.Rngs(2))).values()
    x = np.random.default_rng(0).standard_normal((5, 13)).astype(np.float32)
    assert 0.01 < np.asarray(module.lora_a[...]).std() < 0.03 and 0.01 < np.asarray(module.lora_b[...]).std() < 0.03
    np.testing.assert_array_equal(module(x), layer(x))
    module.lora_e[...] = jnp.asarray([30.0, -20.0, 10.0])
    w, a, e, b = (np.asarray(v[...], np.float64) for v in (layer.kernel, module.lora_a, module.lora_e, module.lora_b))
    weight = w + 5 / 3 * (a * e) @ b
    assert tiny.relative(module(x), x @ weight + np.asarray(layer.bias[...])) < 1e-5
    assert tiny.relative(merged_arrays(module)[0], weight) < 1e-5
    module.lora_e[...] = jnp.asarray([30.0, -20.0, 0.0])  # the divisor stays
    assert tiny.relative(merged_arrays(module)[0], w + 5 / 3 * (a[:, :2] * e[:2]) @ b[:2]) < 1e-5


def sites(ranks):
    """Two sites of two layers each, of these ranks (0: not adapted), padded to RANK."""
    rng, found = np.random.default_rng(0), {}
    for name, own in zip("pq", ranks, strict=True):
        on = np.arange(RANK) < np.array(own)[:, None]
        numbers = {key: jnp.asarray([value if rank else 0.0 for rank in own]) for key, value in SCHEDULE.items()}
        found[name] = SiteArrays(
            lora_a=jnp.asarray(rng.standard_normal((2, 9, RANK)) * on[:, None], jnp.float32),
            lora_e=jnp.asarray(rng.standard_normal((2, RANK)) * on, jnp.float32),
            lora_b=jnp.asarray(rng.standard_normal((2, RANK, 5)) * on[..., None], jnp.float32),
            scale=jnp.ones(2),
            triplets=jnp.asarray(own, jnp.float32),
            **numbers,
        )
    return found


RANKS = [(4, 2), (0, 3)]


def test_the_penalty_is_of_what_is_no_padding():
    of, terms = sites(RANKS), []
    for name, own in zip("pq", RANKS, strict=True):
        for layer, rank in enumerate(own):
            a, b = (np.asarray(v[layer], np.float64) for v in (of[name].lora_a, of[name].lora_b))
            terms += [np.linalg.norm(f.T @ f - np.eye(rank)) for f in (a[:, :rank], b[:rank].T)] if rank else []
    assert float(METHOD.penalty(of)) == pytest.approx(0.5 * np.mean(terms), rel=1e-5) and len(terms) == 6

    def penalty(a):
        return METHOD.penalty(of | {"q": SiteArrays(**vars(of["q"]) | {"lora_a": a})})

    gradient = jax.grad(penalty)(of["q"].lora_a)
    assert np.isfinite(gradient).all() and not gradient[0].any() and not gradient[1, :, 3].any() and gradient[1, :, :3].any()


def test_the_budget_falls_and_the_best_triplets_stay():
    """Statistics, scores, budget and threshold, step by step; E grows again between two allotments, until the last."""
    of, rng = sites(RANKS), np.random.default_rng(1)
    arrays = {f"{site}.{name}": np.asarray(getattr(of[site], name)) for site in "pq" for name in ("lora_a", "lora_e", "lora_b")}
    own = {site: np.arange(RANK) < np.array(ranks)[:, None] for site, ranks in zip("pq", RANKS, strict=True)}
    state, trained = METHOD.init_state(of), {name: jnp.asarray(a) for name, a in arrays.items()}
    smooth, unsure = ({name: np.zeros(a.shape) for name, a in arrays.items()} for _ in range(2))
    counts, after = [], jax.jit(lambda s, t, g, k: METHOD.after_step(s, t, g, of, k, jnp.float32(STEPS)))
    for step in range(STEPS):
        gradients = {name: np.where(a == 0, 0, rng.standard_normal(a.shape)).astype(np.float32) for name, a in arrays.items()}
        trained = {name: jnp.asarray(a) for name, a in arrays.items()}  # as if all had grown again
        state, trained = after(state, trained, gradients, jnp.int32(step))
        if step < STEPS - 3:
            for name, a in arrays.items():
                now = np.abs(a * gradients[name])
                smooth[name] = 0.85 * smooth[name] + 0.15 * now
                unsure[name] = 0.7 * unsure[name] + 0.3 * np.abs(now - smooth[name])
        score = {}
        for site in "pq":
            a, e, b = (smooth[f"{site}.{name}"] * unsure[f"{site}.{name}"] for name in ("lora_a", "lora_e", "lora_b"))
            score[site] = e + a.mean(-2) + b.mean(-1)
        kept = {site: np.asarray(trained[f"{site}.lora_e"]) != 0 for site in "pq"}
        counts.append(sum(int(on.sum()) for on in kept.values()))
        if counts[-1] < 9:
            values = np.concatenate([score[site][own[site]] for site in "pq"])
            best = np.sort(values)[-counts[-1]]
            assert all(np.array_equal(kept[site], own[site] & (score[site] >= best)) for site in "pq")
        for name in arrays:
            if not name.endswith("lora_e"):
                np.testing.assert_array_equal(trained[name], arrays[name])
    budget = [int(6 * (1 - (step - 2) / 7) ** 3 + 3) for step in (4, 6, 8)]  # from 9 triplets to one in each of 3 layers
    assert counts == [9, 9, 9, 9, budget[0], 9, budget[1], 9, budget[2], 3, 3, 3]


def test_what_it_cannot_do_is_said():
    section = tiny.adapter(method="adalora", tinit=5, tfinal=4)
    METHOD.check_steps(section, 10)
    with pytest.raises(InputError, match=r"adapter\.tinit, adapter\.tfinal: 5 and 4 leave no step of 9"):
        METHOD.check_steps(section, 9)
    with pytest.raises(InputError, match=r"adapter\.target_r: 8 .*q_proj.*4"):
        resolve(tiny.encoder(2), tiny.adapter(method="adalora", targets=["q_proj"], rank=4))
