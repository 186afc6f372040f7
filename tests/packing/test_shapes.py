"""A pack of shapes, against what is really placed and compiled."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.models import load as loading
from lora_jax.models.decoder import Decoder
from lora_jax.models.heads import LanguageModel
from lora_jax.packing import cost
from lora_jax.packing.cost import PackShapes
from lora_jax.packing.execution import VMAP, configured_mode
from lora_jax.packing.pack import Pack
from lora_jax.packing.planner import Planner
from lora_jax.parallel.program import Program
from lora_jax.sweeps.space import members_of
from lora_jax.tasks.objectives import CHUNK_FLOATS
from lora_jax.training.setup import Preparer, set_up
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def abstract(config):
    return Preparer(weights=False)(config)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"sweep": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_parameters_lie_where_it_says(hub, tmp_path, mesh, method):
    config = hub.config(tmp_path, {"mesh": mesh, "adapter.method": method, "adapter.targets": "all-linear"})
    placed = {p.name: p for p in PackShapes(abstract(config), [config, config]).placements(2)}
    setup = set_up(config)
    pack = Pack.build(setup.model, [config, config], setup.steps, setup.mesh)
    assert set(placed) == set(pack.part.frozen) | set(pack.part.trainable)
    for name, array in pack.part.frozen.items():
        assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(setup.mesh, placed[name].spec), array.ndim), name
        assert placed[name].bytes == array.addressable_shards[0].data.nbytes and not placed[name].trained
    for name, array in pack.state.trainable.items():
        assert placed[name].bytes == array.addressable_shards[0].data.nbytes and placed[name].trained, name


CASES = {
    "lora": {},
    "trunk": {"adapter.layers": "last:1"},
    "full": {"adapter.method": "full"},
    "head": {"adapter.method": "head"},
    "tagging": {"task": "tagging"},
    "decoder": {"causal": True},
}


@pytest.mark.parametrize("case", [c if c == "trunk" else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_without_weights_the_programs_are_those_of_the_run(hub, tmp_path, monkeypatch, case):
    """The very text that is compiled, so the memory is that of the run, and the cache on disk gives a plan's programs to its run."""
    changes = dict(CASES[case])
    causal = changes.pop("causal", False)
    if changes.get("task") == "tagging":
        changes["task"] = hub.tagging()
    config = hub.config(tmp_path, {"mesh": {"data": 2}} | changes, causal=causal)
    setup = set_up(config)
    pack = Pack.build(setup.model, [config] * 3, setup.steps, setup.mesh, configured_mode(config) or VMAP)
    trunk = setup.trunk(pack.part, 0)
    inputs, held_out = setup.step_inputs(0, setup.plan.batch(0), trunk), setup.held_out_inputs(setup.plan.eval_batches()[0], trunk)
    real = [
        pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, inputs, np.int32(0)).as_text(),
        pack.programs.evaluate.lower(pack.state.trainable, pack.fixed.settings, pack.part.frozen, held_out).as_text(),
    ]
    monkeypatch.setattr(loading.BaseFiles, "load", lambda *_: pytest.fail("weights were loaded"))
    lowered, lower = [], Program.lower

    def noted(program, *args):
        lowered.append(lower(program, *args).as_text())
        return SimpleNamespace(compile=lambda: None)

    monkeypatch.setattr(Program, "lower", noted)
    monkeypatch.setattr(cost, "program_bytes", lambda compiled: 10**9)
    shapes = PackShapes(abstract(config), [config])
    shapes.memory(3)
    assert lowered == real
    assert (shapes.depth > 0) == (case in ("trunk", "head"))


def test_a_distillation_without_weights(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.BaseFiles, "load", lambda *_: pytest.fail("weights were loaded"))
    task = {"kind": "distillation", "source": str(hub.reviews), "text": "text", "teacher": str(hub.bert), "eval_size": 20, "max_length": 24}
    config = hub.config(tmp_path, {"task": task})
    memory = PackShapes(abstract(config), [config]).memory(1)
    assert memory.base > 30_000 and memory.activations > 0


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "members"), [(None, 1), ("last:1", 4)])
def test_an_upper_bound_is_above_what_is_compiled(hub, tmp_path, layers, members):
    config = hub.config(tmp_path, {"adapter.layers": layers, "adapter.targets": "all-linear"})
    shapes = PackShapes(abstract(config), [config])
    assert shapes.memory(members).total < shapes.upper_bound(members) < 30 * shapes.memory(members).total


def test_nothing_is_compiled_where_memory_is_ample(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(PackShapes, "memory", lambda *_: pytest.fail("compiled"))
    config = hub.config(tmp_path, {"sweep": {"grid": {"adapter.rank": [2, 3, 4]}, "memory_limit": "10GB"}})
    (pack,) = Planner(config, Preparer(), largest=16).packs(members_of(config))
    assert len(pack.members) == 3


def layer_floats(block, tokens, length):
    """Numbers that one layer computes on the way: norms, residuals, projections, attention's scores, hidden units."""
    inner, kv = block.heads * block.head_dim, block.kv_heads * block.head_dim
    hidden = (3 if block.gated else 2) * block.hidden + (0 if block.experts is None else 3 * block.width)
    return tokens * (6 * block.width + 2 * inner + 4 * kv + 3 * block.heads * length + block.experts_used * hidden)


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
