"""Grouped products against NumPy, row by row in float64; their gradients; and what `jax.vmap` makes of them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.experts import grouped_matmul

ROWS, GROUPS, K, N, MEMBERS = 13, 4, 5, 3, 2
TOL = {"rtol": 1e-5, "atol": 1e-5}


def arrays(*own: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, weights and groups (group 2 has no rows); those that are `own` have members in front."""
    rng = np.random.default_rng(seed)
    lead = [(MEMBERS,) if o else () for o in own]
    groups = np.array([0, 1, 3])[rng.integers(0, 3, (*lead[2], ROWS))].astype(np.int32)
    return *(rng.standard_normal((*at, *shape)) for at, shape in zip(lead, ((ROWS, K), (GROUPS, K, N)), strict=False)), groups


def expected(x: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.stack([row @ weights[group] for row, group in zip(x, groups, strict=True)])


@pytest.mark.parametrize("own", list(itertools.product([False, True], repeat=3)))
def test_each_row_has_its_own_weight(own: tuple[bool, bool, bool]):
    given = arrays(*own)
    x, weights, groups = map(jnp.asarray, given)
    with jax.default_matmul_precision("highest"):
        run, slope = grouped_matmul, jax.grad(lambda x, w, g: jnp.sum(jnp.sin(grouped_matmul(x, w, g))), (0, 1))
        if any(own):
            axes = tuple(0 if o else None for o in own)
            run, slope = jax.vmap(run, axes), jax.vmap(slope, axes)
        y, (dx, dw) = jax.jit(run)(x, weights, groups), jax.jit(slope)(x, weights, groups)
    members = range(MEMBERS) if any(own) else [None]
    for m in members:
        mine = [a[m] if o and m is not None else a for a, o in zip(given, own, strict=True)]
        want = expected(*mine)
        dy = np.cos(want)
        want_dw = np.zeros(mine[1].shape)
        np.add.at(want_dw, mine[2], mine[0][:, :, None] * dy[:, None, :])
        found = [a if m is None else a[m] for a in (y, dx, dw)]
        for ours, theirs in zip(found, (want, expected(dy, mine[1].swapaxes(1, 2), mine[2]), want_dw), strict=True):
            np.testing.assert_allclose(ours, theirs, **TOL)
    assert not np.asarray(dw)[..., 2, :, :].any()  # no row, no gradient


def test_members_of_members():
    """A pack inside of a pack, as a mixed batch may be: vmap of vmap."""
    x, weights, groups = map(jnp.asarray, arrays(True, True, True))
    twice = jax.vmap(jax.vmap(grouped_matmul), (None, 0, None))(x, jnp.stack([weights, 2 * weights]), groups)
    once = jax.vmap(grouped_matmul)(x, weights, groups)
    np.testing.assert_allclose(twice, jnp.stack([once, 2 * once]), rtol=1e-5, atol=1e-5)
