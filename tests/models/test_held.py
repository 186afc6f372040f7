"""Weights that a file holds quantised stay so in memory: they compute what the dequantised ones do, in a run as alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

import lora_jax
from experiments.fuzz import bits_of_run, differing
from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.merge import merged_base
from lora_jax.adapters.sites import find_sites
from lora_jax.config.schema import MeshConfig
from lora_jax.errors import InputError, Stopped
from lora_jax.models import load as loading
from lora_jax.models import quantized
from lora_jax.models.heads import LanguageModel
from lora_jax.models.quantized import Held, held_bytes
from lora_jax.packing.cost import PackShapes
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh
from lora_jax.sweeps.run import run_sweep
from lora_jax.training.setup import Preparer
from lora_jax.weights.four_bit import FourBit
from lora_jax.weights.gguf_blocks import Blocks
from lora_jax.weights.provenance import fingerprint
from lora_jax.weights.quantized import Float8, Mixed, WholeNumbers
from lora_jax.weights.safetensors import Tensor, write_safetensors
from tests import tiny
from tests.gguf_files import write_gguf
from tests.hlo import float_arrays
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.filterwarnings("ignore:.*multiplied by their scales")]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


TOKENS = jnp.arange(1, 21).reshape(2, 10)
KINDS = {
    "attn_q": Kind.Q4_0, "attn_k": Kind.Q4_0, "attn_v": Kind.Q8_0, "blk.1.attn_v": Kind.Q5_0, "attn_output": Kind.Q5_0,
    "ffn_gate": Kind.Q4_1, "ffn_up": Kind.Q4_1, "ffn_down": Kind.Q8_0, "blk.2.ffn_down": Kind.F16, "token_embd": Kind.Q8_0,
}  # fmt: skip


FLOAT8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}


def load_model(source: Any, **options: Any) -> Any:
    return loading.load_model(str(source), **options)


@pytest.fixture(scope="module")
def blocks(hub, tmp_path_factory) -> Path:
    """A GGUF file in several types: one site's layers differ in theirs, another's are partly not quantised."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = json.loads((hub.llama / "config.json").read_text()) | {"rms_norm_eps": 1e-6, "max_position_embeddings": 64}
    write_gguf(file, config, load_file(hub.llama / "model.safetensors"), kinds=KINDS)
    return file


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", {n: Tensor(v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def float8(hub, tmp_path_factory) -> Path:
    """The tiny decoder in float8."""
    folder = tmp_path_factory.mktemp("float8")
    for file in hub.llama.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_text(file.read_text())
    config = json.loads((hub.llama / "config.json").read_text()) | FLOAT8
    write(folder, config, in_float8(load_file(hub.llama / "model.safetensors"), ("_proj.weight",)))
    return folder


def test_blocks_of_a_file_compute_what_their_weights_do(blocks):
    with pytest.warns(UserWarning, match=r"1 kinds of weights cannot be kept.*: layers.mlp.down_proj is Q8_0 and not quantised"):
        held = load_model(blocks, quantized="keep")
    whole = load_model(blocks)
    assert tiny.relative(tiny.outputs(held, TOKENS), tiny.outputs(whole, TOKENS)) < 1e-5
    assert [dataclass_of(s) for s in find_sites(held)] == [dataclass_of(s) for s in find_sites(whole)]
    assert held_bytes(held) < 0.45 * held_bytes(whole) and fingerprint(held) != fingerprint(whole)
    forms = {str(path[-1]): m.form for path, m in nnx.iter_modules(held) if isinstance(m, Held)}
    assert isinstance(forms["v_proj"], Mixed) and forms["v_proj"].of_layer == (0, 1, 0)
    for path, module in nnx.iter_modules(held):
        if isinstance(module, Held):
            own: Any = dict(nnx.iter_modules(whole))[path]
            weight = "embedding" if path[-1] == "embed" else "kernel"
            assert np.abs(np.asarray(getattr(module, weight)[...]) - np.asarray(getattr(own, weight)[...])).max() < 1e-6


def dataclass_of(site: Any) -> tuple[Any, ...]:
    return site.path, site.kind, site.names, site.depth, site.inputs, site.outputs


MEMBERS = [
    {"adapter__rank": 2, "adapter__targets": ["q_proj", "v_proj", "down_proj"], "adapter__layers": "last:2"},
    {"adapter__rank": 3, "adapter__targets": "all-linear", "adapter__dropout": 0.1, "training__seed": 2},
]


def train(source: Path, members: list[dict[str, Any]], mesh: dict[str, int] | None = None, **options: Any) -> np.ndarray:
    """(steps, members): the losses of 8 steps."""
    on = None if mesh is None else make_mesh(MeshConfig(**mesh))
    model = LanguageModel(load_model(source, mesh=on, **options))
    pack, losses = Pack.build(model, [tiny.config(**member) for member in members], 8, on), []
    state = pack.state
    for step in range(8):
        batch = tiny.batch(step, rows=8, causal=True, vocab=30)
        placed = batch if on is None else place_batch(on, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    pack.programs.check()
    return np.stack(losses)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*model.quantized. keep, but")
def test_members_train_over_blocks_as_over_their_weights_and_as_alone(blocks, monkeypatch):
    monkeypatch.setattr(quantized, "SLICE", 200)  # the table of 33 rows of 32 in parts
    losses = train(blocks, MEMBERS, quantized="keep")
    assert tiny.relative(losses, train(blocks, MEMBERS)) < 1e-5
    for k, member in enumerate(MEMBERS):
        assert tiny.relative(losses[:, k], train(blocks, [member], quantized="keep")[:, 0]) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*model.quantized. keep, but")
@pytest.mark.parametrize("kind", ["blocks", pytest.param("float8", marks=pytest.mark.long)])
def test_a_mesh_is_one_device(kind, request):
    source = request.getfixturevalue(kind)
    spread = train(source, MEMBERS, {"data": 2, "fsdp": 2, "tensor": 2}, quantized="keep")
    assert tiny.relative(spread, train(source, MEMBERS, quantized="keep")) < 1e-5


@pytest.mark.filterwarnings("ignore:.*model.quantized. keep, but", "ignore:merging")
def test_merging_over_blocks_is_faithful(blocks):
    model = load_model(blocks, quantized="keep")
    adapted = tiny.trained(model, rank=2, targets="all-linear")
    merged = lora_jax.merge(adapted)
    assert tiny.relative(tiny.outputs(merged, TOKENS), tiny.outputs(adapted, TOKENS)) < 1e-5
    assert np.array_equal(tiny.outputs(lora_jax.unmerge(merged), TOKENS, bits=True), tiny.outputs(adapted, TOKENS, bits=True))
    with pytest.raises(InputError, match="nothing here quantises to this type"):
        merged_base(adapted, requantize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*model.quantized. keep, but")
def test_a_bank_mixed_rows_and_generation_over_blocks(blocks):
    held, whole = load_model(blocks, quantized="keep"), load_model(blocks)
    values = {"wide": {"targets": "all-linear", "rank": 3}, "late": {"targets": ["q_proj", "embed"], "layers": "last:1", "rank": 2}}
    banks = [AdapterBank(base) for base in (held, whole)]
    for seed, (name, own) in enumerate(values.items()):
        for bank in banks:
            bank.add(name, tiny.trained(bank.base, seed, **own))
    rows, tokens = ["late", None, "wide"], jnp.arange(1, 31).reshape(3, 10)
    mine, dense = (tiny.outputs(bank.mixed(rows), tokens) for bank in banks)
    assert tiny.relative(mine, dense) < 1e-5
    for row, name in enumerate(rows):
        assert tiny.relative(mine[row], tiny.outputs(banks[0].use(name), tokens)[row]) < 1e-5
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    answers = [lora_jax.generate(bank.mixed(rows), prompts, max_new_tokens=6, stop=[]) for bank in banks]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]


@pytest.mark.parametrize(
    ("form", "rows"),
    [(Blocks("Q8_0"), 48), (Float8("float8_e4m3fn", (16, 16)), 53), (FourBit("nf4", 32, True), 53), (WholeNumbers(8, None), 53)],
)
def test_a_vocabulary_is_multiplied_by_in_slices(form, rows, monkeypatch):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((rows, 64)), jnp.float32)
    if isinstance(form, Blocks):
        arrays: Any = form.stored(gguf.quants.quantize(np.asarray(table), Kind.Q8_0))
    else:
        arrays = jax.jit(form.encode)(table)
    held = quantized.QuantizedEmbedding(form, arrays, rows, 64, axes=("vocab", "embed"), dtype=jnp.float32)
    x = jnp.asarray(random.standard_normal((3, 5, 64)), jnp.float32)

    def both() -> list[np.ndarray]:
        # A new function, so that it is traced again.
        y, pull = jax.vjp(lambda x: held.attend(x), x)
        return [np.asarray(y), np.asarray(pull(jnp.sin(y))[0]), np.asarray(jax.vmap(held.attend, 1, 1)(x))]

    whole = both()
    assert held.slices == 1 and tiny.relative(whole[0], x @ held.dense_embedding().T) < 1e-6
    monkeypatch.setattr(quantized, "SLICE", 12 * 64)
    assert held.slices == (4 if rows == 48 else 5)  # 12 rows each; 11 and the last 9
    for found, wanted in zip(both(), whole, strict=True):
        assert tiny.relative(found, wanted) < 1e-5


def in_float8(tensors: dict[str, np.ndarray], ends: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Tensors as a file has them, those with these ends in float8 with scales in blocks of 16 by 16."""
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith(ends):
            arrays = Float8("float8_e4m3fn", (16, 16)).encode(jnp.asarray(value))
            found |= {name: np.asarray(arrays["codes"]), f"{name}_scale_inv": np.asarray(arrays["scales"])}
        else:
            found[name] = value
    return found


@pytest.mark.slow
def test_a_step_makes_no_weight_whole(hub, tmp_path, monkeypatch):
    """Of its arrays of floats none is all layers of a weight, nor the vocabulary's matrix; the test would find it."""
    transforms = [{"kind": "quantize", "block": 32, "embeddings": True}]
    config = hub.config(tmp_path, {"model.transforms": transforms, "adapter.targets": "all-linear"}, causal=True)
    setup: Any = Preparer(weights=False)(config)
    table = setup.base.embed.embedding_shape
    whole = {s for shape in ((3, 32, 64), (3, 32, 32), (3, 16, 32), table) for s in itertools.permutations(shape)}
    for size, found in ((quantized.SLICE, {table}), (200, set())):
        monkeypatch.setattr(quantized, "SLICE", size)
        made = float_arrays(PackShapes(setup, [config]).compiled_step(1).as_text())
        assert {tuple(sorted(shape)) for shape in made & whole} == {tuple(sorted(shape)) for shape in found}


def test_experts_and_a_trained_head(hub, tmp_path):
    """Two tensors of each expert are one weight of ours; a head is left as it is."""
    config, plain = json.loads((hub.llama / "config.json").read_text()) | FLOAT8, load_file(hub.llama / "model.safetensors")
    more = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "rms_norm_eps": 1e-6, "num_hidden_layers": 1}
    random, inside = np.random.default_rng(0), "model.layers.0.block_sparse_moe."
    shapes = {f"{inside}experts.{e}.{name}.weight": (32, 64) if name == "w2" else (64, 32) for e in (0, 1) for name in ("w1", "w2", "w3")}
    experts = {n: random.standard_normal(shape).astype(np.float32) / 8 for n, shape in (shapes | {f"{inside}gate.weight": (2, 32)}).items()}
    tensors = {n: v for n, v in plain.items() if not any(part in n for part in ("mlp", "layers.1", "layers.2"))} | experts
    write(tmp_path / "moe", config | more, in_float8(tensors, (*(f"w{i}.weight" for i in (1, 2, 3)), "_proj.weight")))
    held, whole = load_model(tmp_path / "moe", quantized="keep"), load_model(tmp_path / "moe")
    assert sum(isinstance(m, quantized.QuantizedExperts) for _, m in nnx.iter_modules(held)) == 2
    assert tiny.relative(tiny.outputs(held, TOKENS), tiny.outputs(whole, TOKENS)) < 1e-5
    named = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    head = {"score.weight": random.standard_normal((2, 32)).astype(np.float32)}
    write(tmp_path / "head", config | named, in_float8(plain | head, ("_proj.weight",)))
    held, whole = (load_model(tmp_path / "head", head="classification", quantized=q) for q in ("keep", "dequantize"))
    assert isinstance(held.classifier, nnx.Linear) and sum(isinstance(m, Held) for _, m in nnx.iter_modules(held)) == 7
    assert tiny.relative(tiny.outputs(held, TOKENS), tiny.outputs(whole, TOKENS)) < 1e-5


@pytest.mark.long
def test_a_run_over_float8_resumes_exactly_and_is_evaluated_and_exported(hub, float8, tmp_path, monkeypatch):
    held, whole = load_model(float8, quantized="keep"), load_model(float8)
    assert tiny.relative(tiny.outputs(held, TOKENS), tiny.outputs(whole, TOKENS)) < 1e-5
    changes = {"model.source": str(float8), "model.quantized": "keep", "tracking.checkpoint_every": 2, "training.eval_every": 3}
    done = call("train", hub.write(tmp_path, changes, causal=True))
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    (tmp_path / "again").mkdir()
    again = hub.config(tmp_path / "again", changes, causal=True)
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(again)
    assert not differing(bits_of_run(run), bits_of_run(run_sweep(again).path))
    assert call("evaluate", run).code == 0
    exported = call("export", run, "--out", tmp_path / "hf", "--dtype", "float32")
    assert exported.code == 0 and "the dequantised ones that the adapter was trained on" in exported.err, exported.err
    assert "as quantised in its file" in (tmp_path / "hf" / "README.md").read_text()
    rounded = call("export", run, "--out", tmp_path / "rounded", "--requantize", "--dtype", "float32")
    assert rounded.code == 0 and "float8_e4m3fn, blocks of 16 by 16" in rounded.err, rounded.err
    # Over the same file's dequantised weights it is another base, and refused.
    other = run / "config.yaml"
    other.write_text(other.read_text().replace("quantized: keep", "quantized: dequantize"))
    refused = call("export", run, "--out", tmp_path / "other")
    assert refused.code == 2 and "base" in refused.err, refused.err


def test_nothing_to_keep_and_a_file_cut_short(hub, blocks, tmp_path):
    with pytest.raises(InputError, match="model.quantized: keep, but no weight is stored quantised"):
        load_model(hub.llama, quantized="keep")
    whole = blocks.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=r"short.gguf: cut short"):
        load_model(tmp_path / "short.gguf", quantized="keep")
    (tmp_path / "odd.yaml").write_text(hub.write(tmp_path, {"model.quantized": "kep"}).read_text())
    refused = call("train", tmp_path / "odd.yaml")
    assert refused.code == 2 and "model.quantized" in refused.err and "keep" in refused.err
