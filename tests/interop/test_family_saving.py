"""Every family: what was loaded is written back as it was, name by name and bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from safetensors.numpy import load_file

from lora_jax.models.load import load_model
from lora_jax.models.tensors import base_tensors
from lora_jax.weights.safetensors import write_checkpoint
from tests.interop.zoo import ZOO, Zoo

pytestmark = pytest.mark.interop

WHOLE = [name for name, entry in ZOO.items() if entry.head in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]


@pytest.mark.parametrize("name", WHOLE)
def test_saving_gives_the_checkpoint_back_bit_for_bit(zoo: Zoo, name: str, tmp_path: Path):
    write_checkpoint(tmp_path, base_tensors(load_model(str(zoo.source(name)))), largest=2**30)
    stored, saved = (load_file(folder / "model.safetensors") for folder in (zoo.source(name), tmp_path))
    assert saved.keys() == stored.keys()
    for key, tensor in stored.items():
        assert saved[key].dtype == tensor.dtype and saved[key].shape == tensor.shape, key
        assert saved[key].tobytes() == tensor.tobytes(), key
