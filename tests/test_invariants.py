"""The base is never differentiated, copied or returned, and compile time does not grow with depth (DESIGN.md, section 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.packing.pack import Pack
from tests import tiny

MEMBERS = [{"adapter__rank": 2, "training__seed": k} for k in range(2)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def _pack(model, **values):
    return Pack.build(model, [tiny.config(**(m | values)) for m in MEMBERS], 10)


def _arguments(pack, batch):
    return pack.state, pack.fixed, pack.part.frozen, batch, np.int32(0)


def _bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key))


CASES = [
    ("encoder", "dots", {"adapter__targets": "attention", "adapter__layers": "last:2"}),
    pytest.param("encoder", "none", {"adapter__targets": "attention", "adapter__dropout": 0.1}, marks=pytest.mark.long),
    pytest.param("encoder", "full", {"adapter__targets": ["q_proj"], "adapter__bias": "lora_only"}, marks=pytest.mark.long),
    ("decoder", "dots", {"adapter__targets": ["down_proj"], "adapter__layers": "last:2"}),
]


@pytest.mark.parametrize(("kind", "remat", "values"), CASES)
def test_the_compiled_step_holds_one_copy_of_the_base(kind, remat, values):
    """16 layers of 0.5 or 2 MB each, and activations of a few hundred kB: any copy of the stack, or its gradient, would stand out."""
    if kind == "encoder":
        model, batch = tiny.classifier(16, width=256), tiny.batch(rows=1, length=8)
        model.base.layers.remat = remat
    else:
        model, batch = tiny.language_model(16, width=128, vocab=2048), tiny.batch(rows=1, length=8, micro=2, causal=True)
    pack = _pack(model, **values)
    base, members = _bytes(pack.part.frozen), _bytes((pack.state, pack.fixed))
    assert base > 8e6 and members < base / 4
    compiled = pack.programs.train.lower(*_arguments(pack, batch)).compile()
    memory = compiled.memory_analysis()
    assert 0.95 * base < memory.argument_size_in_bytes < 1.05 * (base + members) + 1e5  # an argument, not a constant, and once
    assert memory.output_size_in_bytes < 1.05 * _bytes(pack.state) + 1e5
    assert memory.temp_size_in_bytes < base / 2, f"{memory.temp_size_in_bytes / 1e6:.1f} MB of temporaries, a base of {base / 1e6:.1f} MB"


def test_full_training_differentiates_what_it_must():
    """The measure above does see a gradient of the base: full training has one and its optimizer state."""
    pack = Pack.build(tiny.classifier(4), [tiny.config(adapter__method="full")], 10)
    assert _bytes(pack.state) > 3 * _bytes(pack.state.trainable) * 0.99 and not pack.part.frozen


def test_nothing_large_is_a_constant_and_nothing_of_the_base_comes_out():
    pack = _pack(tiny.classifier(3), adapter__targets="all-linear", adapter__layers="last:2")
    jaxpr, shapes = jax.make_jaxpr(pack.programs.train.traces.function, return_shape=True)(*_arguments(pack, tiny.batch()))
    assert max((np.size(c) for c in jaxpr.consts), default=0) < 64
    out, metrics = shapes
    assert jax.tree.structure(out) == jax.tree.structure(pack.state)
    assert set(out.trainable) == set(pack.part.labels)
    assert all(m.shape == (2,) for m in jax.tree.leaves(metrics))


def test_optimizer_state_is_of_the_trainable_arrays_alone():
    pack = _pack(tiny.classifier(3), adapter__targets=["q_proj"])
    trained = sum(a.size for a in jax.tree.leaves(pack.state.trainable))
    moments = sum(a.size for a in jax.tree.leaves(pack.state.optimizer))
    assert 2 * trained <= moments < 2 * trained + 100


def test_the_base_of_a_pack_is_the_callers():
    model = tiny.classifier(3)
    pointers = {v.unsafe_buffer_pointer() for v in jax.tree.leaves(nnx.state(model))}
    pack = _pack(model)
    assert {a.unsafe_buffer_pointer() for a in jax.tree.leaves(pack.part.frozen)} < pointers


@pytest.mark.parametrize("make", [tiny.classifier, tiny.language_model])
def test_the_program_does_not_grow_with_depth(make):
    def size(depth):
        pack = _pack(make(depth), adapter__targets="all-linear", adapter__layers="last:3")
        batch = tiny.batch(causal=make is tiny.language_model)
        return len(pack.programs.train.lower(*_arguments(pack, batch)).as_text())

    assert size(30) <= 1.05 * size(6)


def test_below_the_lowest_adapter_the_pack_is_computed_once():
    """No array of the layers below has a member axis: with 7 members and 3 layers below, none is made there of (7, rows, length, width)."""
    model = tiny.classifier(4)
    pack = Pack.build(model, [tiny.config(adapter__targets=["q_proj"], adapter__layers="last:1", training__seed=k) for k in range(7)], 10)
    jaxpr = jax.make_jaxpr(pack.programs.train.traces.function)(*_arguments(pack, tiny.batch(rows=4, length=12)))
    scans = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "scan" and e.params["length"] == 3]
    assert scans, "the layers below are one scan"
    for scan in scans:
        carried = [v.aval.shape for v in scan.outvars]
        assert (4, 12, tiny.WIDTH) in carried and not any(s[:1] == (7,) for s in carried)
    assert not any(e.primitive.name == "scan" and e.params["reverse"] and e.params["length"] == 3 for e in _equations(jaxpr.jaxpr))


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_losses_of_one_step_agree_with_the_base():
    """At step 0 all members have the base's loss, whatever their rank (their heads are drawn by the same seed)."""
    model, batch = tiny.classifier(3), tiny.batch()
    configs = [tiny.config(adapter__rank=r, adapter__targets="all-linear") for r in (1, 8)]
    pack = Pack.build(model, configs, 10)
    micro = {n: jnp.asarray(a[0]) for n, a in batch.items()}
    loss, *_ = pack.programs.evaluate(pack.state.trainable, pack.fixed.settings, pack.part.frozen, micro)
    assert float(loss[0]) == float(loss[1])
