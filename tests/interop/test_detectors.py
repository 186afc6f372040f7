"""YOLOS and DETR beside transformers: logits, boxes, files."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_jax.interop.hf import save_pretrained
from lora_jax.models.load import load_model
from tests import tiny

transformers: Any = transformers  # its own types do not know what the configs take
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::lora_jax.errors.InputWarning")]

NETS: dict[str, dict[str, Any]] = {
    "basic": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "layer_type": "basic"},
    "bottleneck": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "layer_type": "bottleneck"},
}
CASES: dict[str, dict[str, Any]] = {
    "layer positions": {"image_size": [32, 48], "use_mid_position_embeddings": True, "num_hidden_layers": 3},
    "no layer positions": {"image_size": [40, 40], "use_mid_position_embeddings": False, "qkv_bias": False, "hidden_act": "relu"},
}


def drawn(case: str) -> Any:
    """transformers' detector, all its weights and statistics drawn at random."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "intermediate_size": 40}
    sizes |= {"num_detection_tokens": 7}
    if case in NETS:
        net = transformers.ResNetConfig(embedding_size=8, out_features=["stage4"], **NETS[case])
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 40, "num_queries": 7}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "backbone_config": net}
    options: Any = sizes | {"num_labels": 5} | CASES.get(case, {})
    torch.manual_seed(0)
    model = (transformers.DetrForObjectDetection if case in NETS else transformers.YolosForObjectDetection)(
        (transformers.DetrConfig if case in NETS else transformers.YolosConfig)(**options)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model


@pytest.mark.parametrize("case", [*CASES, *NETS])
def test_logits_boxes_and_files_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = drawn(case)
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
    assert type(again) is type(theirs)


def test_a_backbone_under_timms_names(tmp_path: Path) -> None:
    """Older files of DETR name the backbone as timm does; timm itself cannot be imported here, so its names are written down."""
    net = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"]
    )
    torch.manual_seed(0)
    options: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    options |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 3}
    theirs = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=net, **options)).eval()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    theirs.save_pretrained(tmp_path)
    names = {
        r"embedder\.embedder\.convolution\.": "conv1.", r"embedder\.embedder\.normalization\.": "bn1.",
        r"encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.convolution\.": r"layer@\1.\2.downsample.0.",
        r"encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.normalization\.": r"layer@\1.\2.downsample.1.",
        r"encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.convolution\.": r"layer@\1.\2.conv@\3.",
        r"encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.normalization\.": r"layer@\1.\2.bn@\3.",
    }  # fmt: skip

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = re.sub(old, new, name)
        return re.sub(r"@(\d)", lambda m: str(int(m[1]) + 1), name)  # timm counts from 1

    file = tmp_path / "model.safetensors"
    tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
    assert "model.backbone.conv_encoder.model.layer4.1.bn2.running_var" in tensors
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    pixels = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    for own in (None, {"model_type": "timm_backbone", "backbone": "resnet18.a1_in1k"}):
        config |= {"backbone_config": own, "backbone": "resnet18", "use_timm_backbone": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model: Any = load_model(str(tmp_path), head="object_detection")
    with tiny.quick_compile():
        logits, boxes = jax.jit(lambda x: model(x))(pixels)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(boxes, wanted.pred_boxes.numpy(), atol=1e-4)
