"""What a pack is said to need, against what is really placed and compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models import load as loading
from lora_jax.models.decoder import Decoder
from lora_jax.models.heads import LanguageModel
from lora_jax.packing.forecast import forecast, layer_floats
from lora_jax.packing.pack import Pack
from lora_jax.tasks.objectives import CHUNK_FLOATS
from lora_jax.training.setup import set_up
from tests import tiny


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"sweep": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_parameters_lie_where_it_says(hub, tmp_path, mesh, method):
    config = hub.config(tmp_path, {"mesh": mesh, "adapter.method": method, "adapter.targets": "all-linear"})
    told = {p.name: p for p in forecast([config, config], 8).placements}
    setup = set_up(config)
    pack = Pack.build(setup.model, [config, config], setup.steps, setup.mesh)
    assert set(told) == set(pack.part.frozen) | set(pack.part.trainable)
    for name, array in pack.part.frozen.items():
        assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(setup.mesh, told[name].spec), array.ndim), name
        assert told[name].bytes == array.addressable_shards[0].data.nbytes and not told[name].trained
    for name, array in pack.state.trainable.items():
        assert told[name].bytes == array.addressable_shards[0].data.nbytes and told[name].trained, name


def test_nothing_is_loaded(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.BaseFiles, "load", lambda *_: pytest.fail("weights were loaded"))
    config = hub.config(tmp_path, causal=True)
    assert forecast([config], 1).memory["frozen weights"] > 30_000


def test_more_devices_than_there_are(hub, tmp_path):
    config = hub.config(tmp_path, {"mesh": {"fsdp": 16, "data": 64}})
    told = forecast([config], 1)
    assert told.devices == 1024 and told.mesh["fsdp"] == 16
    alone = forecast([hub.config(tmp_path)], 1)
    assert told.memory["frozen weights"] < 1.1 * alone.memory["frozen weights"] / 16


@pytest.mark.slow
def test_the_smollm2_step_is_as_small_as_it_can_be(tmp_path):
    """30 layers of SmolLM2's shapes, 8 x 128 tokens, float32, only layer inputs kept: no copy of the base, and the peak as counted."""
    config = tiny.smollm2_config()
    model = LanguageModel(tiny.random_model(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    model.base.layers.remat = "full"
    for targets in ("attention", "all-linear"):
        pack = Pack.build(model, [tiny.config(adapter__rank=8, adapter__targets=targets)], 10)
        shapes = {name: (1, 8, 128) for name in ("tokens", "positions", "segment_ids")}
        shapes |= {name: (1, 1024) for name in ("target_index", "target_ids", "target_weights")}
        kinds = {name: jnp.float32 if name == "target_weights" else jnp.int32 for name in shapes}
        batch = {name: jax.ShapeDtypeStruct(shape, kinds[name]) for name, shape in shapes.items()}
        compiled = pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, batch, np.int32(0)).compile()
        memory = compiled.memory_analysis()
        base, trainable = (sum(a.nbytes for a in arrays.values()) for arrays in (pack.part.frozen, pack.state.trainable))
        inputs, layer, chunk = 30 * 1024 * 576 * 4, 4 * layer_floats(config.block, 1024, 128), 4 * CHUNK_FLOATS
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        allowed = base + 4 * trainable + inputs + layer + chunk
        print({"targets": targets, "base": base, "peak": peak, "temporaries": memory.temp_size_in_bytes, "of allowed": peak / allowed})
        assert memory.temp_size_in_bytes < base / 2
        assert peak <= 1.15 * allowed
