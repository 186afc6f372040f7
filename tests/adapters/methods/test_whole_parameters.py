"""The methods that train parameters of the base and add nothing to it: which ones train, in packs, merged and exported."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject
from lora_jax.adapters.merge import merge, merged_base
from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import named_variables
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


def trained(model: nnx.Module, method: str, **values: Any) -> set[str]:
    return set(partition(inject(model, tiny.adapter(method=method, **values), rngs=nnx.Rngs(0))).trainable)


def test_ln_tuning_trains_the_norms_alone() -> None:
    norms = {f"layers.{n}.{p}" for n in ("attn_norm", "mlp_norm") for p in ("scale", "bias")} | {"embed_norm.scale", "embed_norm.bias"}
    assert trained(tiny.encoder(2, pooler=False), "ln_tuning") == norms
    assert trained(tiny.decoder(2), "ln_tuning") == {"layers.attn_norm.scale", "layers.mlp_norm.scale", "final_norm.scale"}
    assert trained(tiny.decoder(2, bias=True), "ln_tuning", bias="all") > trained(tiny.decoder(2, bias=True), "ln_tuning")


def test_bitfit_trains_the_biases_alone_and_wants_some() -> None:
    model = tiny.encoder(2)
    biases = {name for name, _ in named_variables(model) if name.endswith("bias")}
    assert trained(model, "bitfit") == biases and len(biases) > 8
    with pytest.raises(InputError, match="'bitfit' trains the biases of the base, and this one has none"):
        inject(tiny.decoder(1), tiny.adapter(method="bitfit"), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="'ln_tuning' trains the norms"):
        inject(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), tiny.adapter(method="ln_tuning"), rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ln_tuning", "bitfit"])
def test_a_pack_equals_its_solo_run_and_is_exported_as_it_is(method: str) -> None:
    model = tiny.classifier(2)
    base = tiny.base_arrays(model)
    chosen = [
        tiny.config(adapter__method=method, optimizer__learning_rate=rate, optimizer__eps=1e-3, training__seed=seed)
        for seed, rate in enumerate((1e-2, 3e-3))
    ]
    packs = [Pack.build(model, chosen, 10), Pack.build(model, chosen[1:], 10)]
    states = []
    for pack in packs:
        state = pack.state
        for step in range(10):
            state, _ = pack.programs.train(state, pack.fixed, pack.part.frozen, tiny.batch(step % 3), np.int32(step))
        states.append(jax.tree.map(np.asarray, state.trainable))
    for name, solo in states[1].items():
        assert tiny.relative(states[0][name][1], solo[0]) < 1e-5, name
    assert tiny.arrays_equal(tiny.base_arrays(model), base)
    part = packs[1].part
    own: Any = {name: jax.numpy.asarray(array[0]) for name, array in states[1].items()}
    settings = {name: array[0] for name, array in packs[1].fixed.settings.items()}
    filled: Any = part.merge(own, settings, part.frozen, training=False)
    tokens = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    outputs = tiny.outputs(filled.base, tokens)
    assert tiny.relative(outputs, tiny.outputs(model.base, tokens)) > 1e-4
    others: list[Any] = [merge(filled), merged_base(filled)]
    assert all(tiny.arrays_equal(tiny.outputs(made.base, tokens), outputs) for made in others)
