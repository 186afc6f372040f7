"""YOLOS beside transformers: logits, boxes, files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers
from safetensors import safe_open

from lora_jax.interop.hf import save_pretrained
from lora_jax.models.load import load_model
from tests import tiny

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::lora_jax.errors.InputWarning")]

CASES: dict[str, dict[str, Any]] = {
    "layer positions": {"image_size": [32, 48], "use_mid_position_embeddings": True, "num_hidden_layers": 3},
    "no layer positions": {"image_size": [40, 40], "use_mid_position_embeddings": False, "qkv_bias": False, "hidden_act": "relu"},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_boxes_and_files_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "intermediate_size": 40}
    options: Any = sizes | {"num_detection_tokens": 7, "num_labels": 5} | CASES[case]
    config = transformers.YolosConfig(**options)
    torch.manual_seed(0)
    theirs = transformers.YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    with tiny.quick_compile():
        model: Any = load_model(str(tmp_path / "theirs"), head="object_detection")
        for shape in ((2, 32, 48, 3), (2, 56, 40, 3)):
            pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            with torch.no_grad():
                wanted = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
            logits, boxes = jax.jit(lambda x: model(x))(pixels)
            np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4)
            np.testing.assert_allclose(boxes, wanted.pred_boxes.numpy(), atol=1e-4)
    save_pretrained(model, tmp_path / "ours")
    with safe_open(tmp_path / "theirs/model.safetensors", "np") as a, safe_open(tmp_path / "ours/model.safetensors", "np") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(a.get_tensor(name).tobytes() == b.get_tensor(name).tobytes() for name in a.keys())  # noqa: SIM118
    again = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.YolosForObjectDetection
