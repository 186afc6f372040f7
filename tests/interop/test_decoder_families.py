"""Every decoder family against transformers on PyTorch: tiny random checkpoints, equal logits at every real token."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

from lora_jax.config.schema import MeshConfig
from lora_jax.models.load import load_model
from lora_jax.parallel.mesh import make_mesh
from tests import tiny
from tests.interop.zoo import VOCAB, ZOO, Zoo

pytestmark = pytest.mark.interop

DECODERS = [name for name, entry in ZOO.items() if entry.head == "AutoModelForCausalLM"]
LENGTH = 24
TOLERANCE = 1e-4  # absolute, float32


def padded(side: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention mask, (4, LENGTH) int32: rows of 24, 17, 9 and 2 tokens."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (4, LENGTH)).astype(np.int32)
    mask = np.zeros_like(tokens)
    for row, count in enumerate((LENGTH, 17, 9, 2)):
        mask[row, :count] = 1
    mask = mask if side == "right" else mask[:, ::-1]
    return np.where(mask, tokens, 0), np.ascontiguousarray(mask)


def counted(mask: np.ndarray) -> np.ndarray:
    """The position ids that `generate` gives padded rows."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)


def batches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and positions, (16, LENGTH): padded right and left, each with positions from the row's start and with counted ones."""
    rows = []
    for side in ("right", "left"):
        tokens, mask = padded(side)
        along = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape)
        rows += [(tokens, mask, along), (tokens, mask, counted(mask))]
    return tuple(map(np.concatenate, zip(*rows, strict=True)))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_transformers(zoo: Zoo, name: str):
    tokens, mask, positions = batches()
    given = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions).long()}
    with torch.no_grad():
        expected = zoo.model(name)(torch.tensor(tokens).long(), **given).logits.numpy()[mask == 1]
    with tiny.quick_compile():
        model = load_model(str(zoo.source(name)))
        ours = tiny.outputs(model, *map(jnp.asarray, (tokens, mask, positions)))[mask == 1]
    print(f"{name}: {np.abs(ours - expected).max():.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_load_from_one_tensor_each_or_one_for_all_and_onto_a_mesh(zoo: Zoo, name: str, tmp_path: Path):
    """transformers' module has the experts in one tensor, the files it writes have one an expert: both are read alike."""
    state = {key: tensor.numpy() for key, tensor in zoo.model(name).state_dict().items()}
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    assert fused in state and fused not in load_file(zoo.source(name) / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((zoo.source(name) / "config.json").read_text())
    wanted = tiny.base_arrays(load_model(str(zoo.source(name))))
    assert tiny.arrays_equal(tiny.base_arrays(load_model(str(tmp_path))), wanted)
    for mesh in (MeshConfig(fsdp=2, tensor=4), MeshConfig(fsdp=8)):  # gate and up are joined on the axis that `tensor` cuts
        assert tiny.arrays_equal(tiny.base_arrays(load_model(str(zoo.source(name)), mesh=make_mesh(mesh))), wanted)


@pytest.mark.parametrize("name", ["llama-gqa-bias", "gpt2", "gpt_neox-serial"])
def test_a_base_that_was_saved_without_its_head_loads(zoo: Zoo, name: str, tmp_path: Path):
    """Its tensors lack the `model.` (`transformer.`, `gpt_neox.`) that stands before them beside a head."""
    zoo.model(name).base_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    bare, whole = (tiny.base_arrays(load_model(str(folder))) for folder in (tmp_path, zoo.source(name)))
    whole.pop("lm_head.kernel", None)
    assert tiny.arrays_equal(bare, whole)
