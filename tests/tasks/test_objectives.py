"""The chunked loss against a naive one in float64: values, gradients, and what has no part in either."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.tasks import objectives as objective
from lora_jax.tasks.objectives import summed_cross_entropy as cross_entropy

N, WIDTH, CLASSES = 23, 8, 11
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, WIDTH)).astype(np.float32)
W = RNG.standard_normal((WIDTH, CLASSES)).astype(np.float32)
A, B = RNG.standard_normal((WIDTH, 2)).astype(np.float32), RNG.standard_normal((2, CLASSES)).astype(np.float32)
IDS = RNG.integers(0, CLASSES, N).astype(np.int32)
WEIGHTS = np.where(RNG.random(N) < 0.3, 0, RNG.random(N)).astype(np.float32)

CHUNKS = [10**9, 7 * CLASSES, 1]  # one chunk, four with padding, and one row each


def _naive(x, w, ids, weights):
    """Loss, accuracy, and the gradients by x and w, in float64."""
    logits = x.astype(np.float64) @ w.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    right = np.eye(w.shape[1])[ids]
    d = (p - right) * weights[:, None]
    loss = -(weights * np.log((p * right).sum(-1))).sum()
    return loss, (weights * (logits.argmax(-1) == ids)).sum(), d @ w.T.astype(np.float64), x.T.astype(np.float64) @ d


@pytest.fixture(params=CHUNKS, autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(objective, "CHUNK_FLOATS", request.param)


def _close(a, b):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-5, atol=2e-5)


def test_values():
    loss, correct, _, _ = _naive(X, W, IDS, WEIGHTS)
    got = cross_entropy(lambda x: x @ W, X, IDS, WEIGHTS)
    _close(got[0], loss)
    _close(got[1], correct)


@pytest.mark.parametrize("jit", [False, True])
def test_a_head_that_reads_out_some_columns(jit):
    """A gather has the number of rows in it: each row is scored by its own logits, as by a decoder that answers with words of classes."""
    columns, ids = np.array([2, 7, 9]), IDS % 3

    def loss(x, w):
        return cross_entropy(lambda h: (h @ w)[..., jnp.array(columns)], x, ids, WEIGHTS)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, correct), (dx, dw) = (jax.jit(grad) if jit else grad)(X, W)
    loss64, correct64, dx64, dw64 = _naive(X, W[:, columns], ids, WEIGHTS)
    for got, wanted in ((value, loss64), (correct, correct64), (dx, dx64), (dw[:, columns], dw64)):
        _close(got, wanted)


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_by_features_and_by_what_the_head_closes_over(jit):
    def loss(x, w, a, b):
        return cross_entropy(lambda h: h @ w + (h @ a) @ b, x, IDS, WEIGHTS)

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (value, correct), (dx, dw, da, db) = (jax.jit(grad) if jit else grad)(X, W, A, B)
    full = W + A @ B
    loss64, correct64, dx64, dw64 = _naive(X, full, IDS, WEIGHTS)
    for got, wanted in (
        (value, loss64),
        (correct, correct64),
        (dx, dx64),
        (dw, dw64),
        (da, dw64 @ B.T.astype(np.float64)),
        (db, A.T.astype(np.float64) @ dw64),
    ):
        _close(got, wanted)


def test_a_trained_head_over_a_frozen_matrix():
    """The head closes over a frozen array and a trained one; the loss is scaled, as by the mean."""

    def loss(a, frozen):
        return 0.25 * cross_entropy(lambda h: (h @ a) @ B + h @ frozen, X, IDS, WEIGHTS)[0]

    _, _, _, dw = _naive(X, W + A @ B, IDS, WEIGHTS)
    _close(jax.jit(jax.grad(loss))(A, W), 0.25 * dw @ B.T.astype(np.float64))


def test_under_vmap_each_member_is_its_own():
    scale = np.array([0.5, 1.0, 2.0], np.float32)

    def loss(s, b):
        return cross_entropy(lambda h: h @ W + (h @ A) @ b, s * X, IDS, WEIGHTS)[0]

    many = np.stack([B, 2 * B, -B])
    values, (ds, db) = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1))))(scale, many)
    for k in range(3):
        value, _, dx64, dw64 = _naive(scale[k] * X, W + A @ many[k], IDS, WEIGHTS)
        _close(values[k], value)
        _close(ds[k], (dx64 * X).sum())
        _close(db[k], A.T.astype(np.float64) @ dw64)


def test_what_has_no_label_has_no_part():
    """Rows of weight 0, the padding of the last chunk among them, change nothing: not even where they overflow."""
    padded = np.concatenate([X, np.full((5, WIDTH), 1e30, np.float32)])
    ids, weights = np.append(IDS, [0] * 5).astype(np.int32), np.append(WEIGHTS, [0] * 5).astype(np.float32)
    run = jax.value_and_grad(lambda x, w, i, u: cross_entropy(lambda h: h @ w, x, i, u)[0], argnums=(0, 1))
    value, (dx, dw) = run(padded, W, ids, weights)
    wanted, _, dx64, dw64 = _naive(X, W, IDS, WEIGHTS)
    _close(value, wanted)
    _close(dx[:N], dx64)
    assert not np.asarray(dx[N:]).any()
    _close(dw, dw64)


def test_right_where_the_logit_is_larger_than_all_others():
    logits = jnp.array([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0], [5.0, 1.0, 1.0]])
    correct = lambda ids: float(cross_entropy(lambda h: h, logits, jnp.array(ids), jnp.array([1.0, 1.0, 0.5]))[1])
    assert correct([1, 0, 0]) == 1.5 and correct([1, 1, 0]) == 1.5  # the tie in the second is not right
    assert correct([0, 2, 1]) == 0


def test_accuracy_has_no_gradient():
    assert not np.asarray(jax.grad(lambda x: cross_entropy(lambda h: h @ W, x, IDS, WEIGHTS)[1])(X)).any()


def test_bfloat16_logits_are_summed_in_float32():
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    loss, dx = jax.value_and_grad(lambda x: cross_entropy(lambda h: h @ w, x, IDS, WEIGHTS)[0])(x)
    assert loss.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    assert float(loss) == pytest.approx(_naive(np.asarray(x, np.float32), np.asarray(w, np.float32), IDS, WEIGHTS)[0], rel=1e-2)


@pytest.mark.parametrize("trained", ["nothing", "a factor", "all"])
def test_log_probs_of_targets_in_a_loss_that_is_no_sum(trained):
    """Of features alone, with a trained factor over a frozen matrix, and with all of it trained: a loss of the sums of two groups."""
    group = np.arange(N) % 2

    def loss(x, w, a):
        logp = objective.target_log_probs(lambda h: h @ w + (h @ a) @ B, x, IDS)
        sums = [jnp.sum(jnp.where(group == k, WEIGHTS * logp, 0)) for k in range(2)]
        return jnp.tanh(0.1 * (sums[0] - sums[1])), logp

    argnums = {"nothing": (0,), "a factor": (0, 2), "all": (0, 1, 2)}[trained]
    (value, logp), grads = jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))(X, W, A)
    whole = W + A @ B
    each = np.array([-_naive(X[i : i + 1], whole, IDS[i : i + 1], np.ones(1))[0] for i in range(N)])
    _close(logp, each)
    side = np.where(group == 0, 0.1, -0.1) * WEIGHTS
    wanted = np.tanh((side * each).sum())
    _close(value, wanted)
    _, _, dx, dw = _naive(X, whole, IDS, -side * (1 - wanted**2))
    every = {0: dx, 1: dw, 2: dw @ B.T.astype(np.float64)}
    for argument, got in zip(argnums, grads, strict=True):
        _close(got, every[argument])


def test_log_probs_under_vmap_and_without_a_gradient():
    many = np.stack([B, 2 * B, -B])
    found = jax.jit(jax.vmap(lambda b: objective.target_log_probs(lambda h: h @ W + (h @ A) @ b, X, IDS)))(many)
    weighed = jax.jit(jax.vmap(jax.grad(lambda b: objective.target_log_probs(lambda h: h @ W + (h @ A) @ b, X, IDS) @ WEIGHTS)))(many)
    for k in range(3):
        loss, _, _, dw = _naive(X, W + A @ many[k], IDS, WEIGHTS)
        _close(found[k] @ WEIGHTS, -loss)
        _close(weighed[k], -A.T.astype(np.float64) @ dw)


def test_a_frozen_matrix_gets_no_gradient():
    """The compiled program does two products with the frozen matrix, forward and back by the features, and keeps no third."""
    n, width, classes = 64, 32, 2048

    def run(a, frozen, x):
        def loss(a):
            return cross_entropy(lambda h: h @ frozen, x @ a, jnp.zeros(n, jnp.int32), jnp.ones(n))[0]

        return jax.vmap(jax.grad(loss))(a)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, width, width), (width, classes), (n, width))]
    compiled = jax.jit(run).lower(*shapes).compile()
    if n * classes <= objective.CHUNK_FLOATS:  # else a loop, whose body XLA counts once
        assert compiled.cost_analysis()["flops"] < 2.6 * (2 * 3 * n * width * classes)
    assert f"f32[3,{width},{classes}]" not in compiled.as_text() and f"f32[3,{classes},{width}]" not in compiled.as_text()
