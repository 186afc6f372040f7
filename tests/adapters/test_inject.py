"""Injection: any NNX model, nothing copied, the caller's model untouched, and the same outputs at step 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
from lora_jax.adapters.inject import LABEL, inject, site_modules
from lora_jax.adapters.parameters import AdapterParam
from lora_jax.adapters.partition import partition
from lora_jax.errors import InputError
from lora_jax.models.layers import PER_SEGMENT
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, (3, 12)).astype(np.int32)
X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


class ListNet(nnx.Module):
    """Layers in a list, a module used twice, an embedding, batch statistics."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(tiny.VOCAB, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.twice = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.classifier = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + jax.nn.relu(block(self.twice(x)))
        return self.classifier(self.norm(self.twice(x)))


class ScanNet(nnx.Module):
    """The user's own scan over layers stacked by `nnx.vmap`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.stacked = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.stacked, x)


def _adapt(model, **values):
    return inject(model, tiny.adapter(**({"rank": 4} | values)), rngs=nnx.Rngs(7))


CASES = [
    pytest.param(lambda: tiny.encoder(4), TOKENS, {"targets": "all-linear"}, marks=pytest.mark.long),
    pytest.param(lambda: tiny.encoder(4), TOKENS, {"targets": "all-linear", "layers": "last:1"}, marks=pytest.mark.long),
    (lambda: tiny.encoder(4), TOKENS, {"targets": "all-linear", "layers": "last:3", "dropout": 0.1}),
    pytest.param(lambda: tiny.encoder(4), TOKENS, {"targets": "embedding"}, marks=pytest.mark.long),
    pytest.param(lambda: tiny.encoder(3, dtype=jnp.bfloat16), TOKENS, {"targets": "all-linear", "rslora": True}, marks=pytest.mark.slow),
    (lambda: tiny.decoder(4), TOKENS, {"targets": "all-linear", "bias": "all"}),
    pytest.param(
        lambda: tiny.decoder(4, tied=False), TOKENS, {"targets": ["lm_head", "down_proj"], "layers": "last:2"}, marks=pytest.mark.long
    ),
    (lambda: tiny.decoder(4), TOKENS, {"targets": "embedding", "modules_to_save": ["final_norm"]}),
    (
        lambda: nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(16, 3, rngs=nnx.Rngs(1))),
        X,
        {"targets": "all-linear"},
    ),
    (lambda: ListNet(nnx.Rngs(0)), TOKENS, {"targets": ["embed", "twice", "1", "classifier"]}),
    (lambda: ScanNet(nnx.Rngs(0)), X, {"targets": "all-linear"}),
]


@pytest.mark.parametrize(("make", "inputs", "values"), CASES)
def test_identity_at_step_0_bit_for_bit(make, inputs, values):
    model = make()
    adapted = _adapt(model, **values)
    assert site_modules(adapted)
    np.testing.assert_array_equal(tiny.outputs(adapted, inputs, bits=True), tiny.outputs(model, inputs, bits=True))


def test_identity_at_step_0_of_a_classifier():
    """Injecting into a classifier that is trained already leaves its head as it is."""
    model = tiny.classifier(2)
    adapted = _adapt(model)
    np.testing.assert_array_equal(adapted.classifier.kernel[...], model.classifier.kernel[...])


@pytest.mark.parametrize(("make", "inputs", "values"), [CASES[2], CASES[7], CASES[8], CASES[9], CASES[10]])
def test_the_factors_are_used(make, inputs, values):
    model = make()
    adapted = _adapt(model, **values)
    rng = np.random.default_rng(0)
    before = tiny.outputs(adapted, inputs)
    for site in site_modules(adapted).values():
        for factor in (site.lora_a, site.lora_b):
            factor[...] = jnp.asarray(0.3 * rng.standard_normal(factor.shape), jnp.float32)
    assert np.abs(tiny.outputs(adapted, inputs) - before).max() > 1e-3


@pytest.mark.parametrize(("make", "inputs", "values"), CASES)
def test_nothing_is_copied_and_the_callers_model_stays_as_it_was(make, inputs, values):
    model = make()
    graphdef, state = nnx.split(model, graph=True)
    pointers = {v[...].unsafe_buffer_pointer() for _, v in nnx.to_flat_state(state)}
    metadata = {path: dict(v.get_metadata()) for path, v in nnx.to_flat_state(state)}
    adapted = _adapt(model, **values)
    part = partition(adapted)
    kept = [a for n, a in (part.frozen | part.trainable).items() if not n.endswith(("lora_a", "lora_b"))]
    assert {a.unsafe_buffer_pointer() for a in kept} == pointers
    for site in site_modules(adapted).values():
        site.lora_b[...] = jnp.ones_like(site.lora_b[...])
    after_graphdef, after = nnx.split(model, graph=True)
    assert after_graphdef == graphdef
    assert {path: dict(v.get_metadata()) for path, v in nnx.to_flat_state(after)} == metadata
    assert not any({LABEL, PER_SEGMENT} & set(m) for m in metadata.values())
    assert not site_modules(model)


def test_layers_below_the_lowest_adapted_one_stay_plain():
    adapted = _adapt(tiny.encoder(4), targets=["q_proj"], layers="last:2")
    lower, upper = adapted.layers.segments
    assert (lower.start, lower.stop, upper.start, upper.stop) == (0, 2, 2, 4)
    assert type(lower.block.attn.q_proj) is nnx.Linear
    assert upper.block.attn.q_proj.lora_a.shape == (2, 32, 4)


def test_factors_are_no_parameters_of_the_base():
    base = tiny.encoder(2)
    adapted = _adapt(base, targets=["q_proj"])
    assert not any("lora" in name for name in tiny.base_arrays(adapted))
    for kind in (AdapterParam, lora_jax.LoRAParam, nnx.LoRAParam):
        assert len(jax.tree.leaves(nnx.state(adapted, kind))) == 2


def test_the_loop_of_flax_docs_trains_the_adapter_and_nothing_else():
    base = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
    adapted = _adapt(base, targets="all-linear")
    optimizer = nnx.Optimizer(adapted, optax.adamw(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1.0) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(adapted, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert tiny.arrays_equal(list(tiny.base_arrays(adapted).values()), list(tiny.base_arrays(base).values()))


def test_a_model_that_bears_adapters_is_refused():
    with pytest.raises(InputError, match="already has adapters"):
        _adapt(_adapt(tiny.encoder(2)))


def test_every_variable_of_the_model_has_a_label():
    adapted = _adapt(tiny.classifier(3), layers="last:1")
    for path, variable in nnx.iter_graph(adapted):
        if isinstance(variable, nnx.Param):
            assert variable.get_metadata().get(LABEL), path


def test_user_trained_under_grad():
    """A notebook's own loop: `nnx.value_and_grad` over AdapterParam alone trains an injected model."""
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
    adapted = _adapt(model, targets="all-linear")

    def loss(m):
        return jnp.mean((m(X) - 1.0) ** 2)

    before = float(loss(adapted))
    grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))
    for _ in range(20):
        _, grads = grad(adapted)
        nnx.update(adapted, jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(adapted, AdapterParam), grads))
    assert float(loss(adapted)) < 0.7 * before
    assert tiny.arrays_equal(list(tiny.base_arrays(adapted).values()), list(tiny.base_arrays(model).values()))
