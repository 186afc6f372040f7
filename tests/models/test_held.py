"""Weights that a file holds quantised stay so in memory: they compute what the dequantised ones do, in a run as alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from experiments.fuzz import bits_of_run, differing
from lora_jax.adapters.sites import find_sites
from lora_jax.errors import InputError, Stopped
from lora_jax.models import load as loading
from lora_jax.models.heads import LanguageModel
from lora_jax.models.quantized import Held, held_bytes
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.run import run_sweep
from lora_jax.weights.provenance import fingerprint
from lora_jax.weights.quantized import Float8, Mixed
from lora_jax.weights.safetensors import Tensor, write_safetensors
from tests import tiny
from tests.gguf_files import write_gguf
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.filterwarnings("ignore:.*multiplied by their scales")]
TOKENS = jnp.arange(1, 21).reshape(2, 10)
KINDS = {
    "attn_q": Kind.Q4_0, "attn_k": Kind.Q4_0, "attn_v": Kind.Q8_0, "blk.1.attn_v": Kind.Q5_0, "attn_output": Kind.Q5_0,
    "ffn_gate": Kind.Q4_1, "ffn_up": Kind.Q4_1, "ffn_down": Kind.Q8_0, "blk.2.ffn_down": Kind.F16, "token_embd": Kind.Q8_0,
}  # fmt: skip


def load_model(source: Any, **options: Any) -> Any:
    return loading.load_model(str(source), **options)


@pytest.fixture(scope="module")
def blocks(hub, tmp_path_factory) -> Path:
    """A GGUF file in several types: one site's layers differ in theirs, another's are partly not quantised."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = json.loads((hub.llama / "config.json").read_text()) | {"rms_norm_eps": 1e-6, "max_position_embeddings": 64}
    write_gguf(file, config, load_file(hub.llama / "model.safetensors"), kinds=KINDS)
    return file


@pytest.fixture(scope="module")
def float8(hub, tmp_path_factory) -> Path:
    """The tiny decoder in float8, its scales in blocks of 16 by 16."""
    folder, tensors = tmp_path_factory.mktemp("float8"), {}
    for name, value in load_file(hub.llama / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            arrays = Float8("float8_e4m3fn", (16, 16)).encode(jnp.asarray(value))
            tensors |= {name: np.asarray(arrays["codes"]), f"{name}_scale_inv": np.asarray(arrays["scales"])}
        else:
            tensors[name] = value
    write_safetensors(folder / "model.safetensors", {n: Tensor(v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()})
    for file in hub.llama.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_text(file.read_text())
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (folder / "config.json").write_text(json.dumps(json.loads((hub.llama / "config.json").read_text()) | said))
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
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


@pytest.mark.slow
def test_members_train_over_blocks_as_over_their_weights(blocks):
    members = [tiny.config(adapter__rank=2, adapter__targets="all-linear", training__seed=seed) for seed in (0, 1)]
    losses = []
    for source in ({"quantized": "keep"}, {}):
        pack = Pack.build(LanguageModel(load_model(blocks, **source)), members, 6, None)
        state, own = pack.state, []
        for step in range(6):
            batch = tiny.batch(step, rows=8, causal=True) | {}
            batch = {n: a % 30 if n in ("tokens", "target_ids") else a for n, a in batch.items()}
            state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(step))
            own.append(np.asarray(metrics.loss))
        pack.programs.check()
        losses.append(np.stack(own))
    assert tiny.relative(losses[0], losses[1]) < 1e-5


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
