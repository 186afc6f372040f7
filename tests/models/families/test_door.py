"""The family door: a family from another package, with its own config keys and tensor names, trains in a YAML sweep."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config.doors import FAMILIES
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.families import find_family, register_family
from lora_jax.models.families.base import Family, Weight, embeddings, projections, size
from lora_jax.models.layers import BlockConfig, LayerType
from lora_jax.models.load import load_model
from lora_jax.models.positions import Rotary
from tests import tiny
from tests.tiny_hub import call

LAYER = "blocks.{i}."
LINEARS = {f"layers.attn.{p}_proj": f"{LAYER}attn.{p}" for p in "qkvo"} | {
    f"layers.mlp.{p}_proj": f"{LAYER}ff.{p}" for p in ("gate", "up", "down")
}
SCALES = {"layers.attn_norm": LAYER + "norm1", "layers.mlp_norm": LAYER + "norm2", "final_norm": "norm"}


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    width, heads = size(hf, "dim"), size(hf, "n_heads")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=size(hf, "n_kv_heads"),
        head_dim=width // heads,
        hidden=size(hf, "ff_dim"),
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=1e-6,
        dtype=dtype,
    )
    return DecoderConfig(block, size(hf, "n_layers"), size(hf, "vocab_size"), (LayerType(rotary=Rotary(width // heads)),), tied=True)


def _weights(_: DecoderConfig) -> dict[str, Weight]:
    scales = {f"{ours}.scale": Weight(theirs) for ours, theirs in SCALES.items()}
    return projections(LINEARS, bias=False) | scales | embeddings({"embed": "tokens"})


OUTSIDE = Family("decoder", _config, _weights, architecture="Outside")


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """The tiny Llama's weights under the outside family's names."""
    path = tmp_path_factory.mktemp("outside") / "model"
    shutil.copytree(hub.llama, path)
    hf = json.loads((path / "config.json").read_text())
    config = {"model_type": "test-outside", "dim": hf["hidden_size"], "n_heads": hf["num_attention_heads"]}
    config |= {"n_kv_heads": hf["num_key_value_heads"], "ff_dim": hf["intermediate_size"], "n_layers": hf["num_hidden_layers"]}
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": hf["vocab_size"]}))
    short = {"model.layers.": "blocks.", "self_attn.": "attn.", "mlp.": "ff.", "_proj": "", "model.embed_tokens": "tokens"}
    short |= {"input_layernorm.weight": "norm1", "post_attention_layernorm.weight": "norm2", "model.norm.weight": "norm"}
    tensors = {}
    for name, value in load_file(path / "model.safetensors").items():
        for old, new in short.items():
            name = name.replace(old, new)
        tensors[name] = value
    save_file(tensors, path / "model.safetensors")
    if "test-outside" not in FAMILIES:
        register_family("test-outside", OUTSIDE)
    return path


def test_the_same_weights_under_other_names(hub, folder):
    assert find_family({"model_type": "test-outside"}, "here") is OUTSIDE
    assert tiny.arrays_equal(tiny.base_arrays(load_model(str(folder))), tiny.base_arrays(load_model(str(hub.llama))))


@pytest.mark.slow
def test_it_trains_in_a_sweep_as_the_family_it_equals(hub, folder, tmp_path):
    losses = {}
    for name, source in (("ours", hub.llama), ("outside", folder)):
        changes = {"model.source": str(source), "sweep": {"grid": {"adapter.rank": [1, 2]}}}
        called = call("sweep", hub.write(tmp_path, changes, causal=True, name=name))
        assert called.code == 0, called.err
        with (tmp_path / "runs" / name / "results.csv").open() as file:
            losses[name] = [row["final_loss"] for row in csv.DictReader(file)]
    assert losses["outside"] == losses["ours"] and len(set(losses["ours"])) == 2


def test_a_name_is_registered_once(folder):
    with pytest.raises(ValueError, match="test-outside"):
        register_family("test-outside", Family("decoder", _config, _weights, architecture="Other"))
