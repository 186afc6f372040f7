"""The scanned stack against layers written out one by one, and what a segment shares with the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.config.schema import MeshConfig
from lora_jax.models.block import make_context
from lora_jax.models.layers import AXES, LayerType
from lora_jax.models.stack import REMAT_POLICIES, Stack
from lora_jax.parallel.constraints import on_mesh
from lora_jax.parallel.mesh import make_mesh
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
ROWS, LENGTH = 3, 10


def _inputs(model):
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, tiny.WIDTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    kinds = model.config.layer_types if model.is_decoder else (LayerType(),)
    return x, make_context(kinds, jnp.ones((ROWS, LENGTH), jnp.int32), positions, causal=model.is_decoder)


def _unrolled(stack, x, context, gather=None):
    """Every layer called by itself, with its own slice of the weights."""
    for i in range(stack.depth):
        graphdef, state = nnx.split(stack.segments[0].block)
        layer = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        x = layer(x, context, gather if i == stack.depth - 1 else None)
    return x


@pytest.mark.parametrize("make", [tiny.encoder, tiny.decoder])
def test_scan_equals_layers_written_out(make):
    model = make(4)
    x, context = _inputs(model)
    np.testing.assert_allclose(
        tiny.outputs(model.layers, x, context), jax.jit(lambda x: _unrolled(model.layers, x, context))(x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gather_keeps_the_positions_asked_for(depth):
    model = tiny.encoder(depth)
    x, context = _inputs(model)
    wanted = jnp.array([0, 7, 29, 7])
    full = tiny.outputs(model.layers, x, context).reshape(-1, tiny.WIDTH)[wanted]
    np.testing.assert_allclose(tiny.outputs(model.layers, x, context, wanted), full, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(1,), (2, 1, 3)])
def test_splitting_changes_no_bit_and_shares_the_weights(cuts):
    model = tiny.encoder(4)
    x, context = _inputs(model)
    before = tiny.outputs(model.layers, x, context, bits=True)
    whole = model.layers.segments[0].block
    for cut in cuts:
        assert model.layers.split_at(cut).start == cut
    assert [(s.start, s.stop) for s in model.layers.segments] == list(zip((0, *sorted(cuts)), (*sorted(cuts), 4)))
    for segment in model.layers.segments:
        assert segment.block.attn.q_proj.kernel is whole.attn.q_proj.kernel
    np.testing.assert_array_equal(tiny.outputs(model.layers, x, context, bits=True), before)


def test_splitting_where_a_segment_starts_gives_that_segment():
    stack = tiny.encoder(3).layers
    assert stack.split_at(0) is stack.segments[0]
    upper = stack.split_at(2)
    assert stack.split_at(2) is upper and len(stack.segments) == 2
    with pytest.raises(ValueError, match=r"0\.\.2"):
        stack.split_at(3)


@pytest.mark.parametrize("make", [pytest.param(tiny.encoder, marks=pytest.mark.slow), tiny.decoder])
def test_remat_policies_agree(make):
    model = make(3)
    x, context = _inputs(model)

    def run(policy):
        model.layers.remat = policy
        graphdef, state = nnx.split(model.layers)
        return jax.jit(jax.value_and_grad(lambda s, x: jnp.sum(nnx.merge(graphdef, s)(x, context) ** 3), argnums=(0, 1)))(state, x)

    value, grads = run("none")
    assert float(jnp.abs(grads[1]).max()) > 0
    for policy in set(REMAT_POLICIES) - {"none"}:
        other, other_grads = run(policy)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
            # A key's bias has no gradient (softmax does not see it): what is there is rounding.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(grads[1]).max()))


@pytest.mark.parametrize("make", [pytest.param(tiny.encoder, marks=pytest.mark.slow), tiny.decoder])
def test_layers_one_by_one_agree_with_the_loop(make):
    """Values and gradients; two segments, so that layers of the upper one have places of their own."""
    model = make(4)
    model.layers.split_at(1)
    x, context = _inputs(model)

    def run(scan, text=False):
        model.layers.scan = scan
        graphdef, state = nnx.split(model.layers)
        step = jax.jit(jax.value_and_grad(lambda s, x: jnp.sum(nnx.merge(graphdef, s)(x, context) ** 3), argnums=(0, 1)))
        return str(step.trace(state, x).jaxpr) if text else step(state, x)

    assert " scan[" in run(True, text=True) and " scan[" not in run(False, text=True)
    with on_mesh(make_mesh(MeshConfig(fsdp=8))):  # its devices would hold all layers' gathered weights at once
        assert " scan[" in run(False, text=True)
    (value, grads), (other, other_grads) = run(True), run(False)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(grads[1]).max()))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("policy", list(REMAT_POLICIES))
def test_what_a_policy_keeps_for_the_backward_pass(policy, scan):
    """No policy keeps a slice of the weights: with them the stacked base would be copied into the saved values."""
    model = tiny.encoder(5)
    model.layers.remat, model.layers.scan = policy, scan
    x, context = _inputs(model)
    graphdef, state = nnx.split(model.layers)
    _, vjp = jax.vjp(lambda x: nnx.merge(graphdef, state)(x, context), x)
    saved = [a for a in jax.tree.leaves(vjp) if a.ndim >= 2]
    weights = {v.shape for v in jax.tree.leaves(state)}
    base = {v.unsafe_buffer_pointer() for v in jax.tree.leaves(state)}
    assert not [a.shape for a in saved if a.shape in weights and a.unsafe_buffer_pointer() not in base]


def test_layers_start_with_weights_of_their_own():
    stack = Stack(lambda rngs: nnx.Linear(3, 5, rngs=rngs), 4, rngs=nnx.Rngs(0))
    kernel = np.asarray(stack.segments[0].block.kernel[...])
    assert len({k.tobytes() for k in kernel}) == 4


@pytest.mark.parametrize(
    "model", [tiny.classifier(3), tiny.language_model(3), tiny.language_model(3, tied=False, bias=True), tiny.encoder(2, pooler=False)]
)
def test_every_parameter_has_an_axis_name_a_dimension(model):
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            axes = variable.get_metadata().get(AXES)
            assert axes is not None and len(axes) == variable.ndim, (path, axes, variable.shape)
            assert ("layers" in axes) == ("segments" in path), path
