"""Families of vision transformers against transformers on PyTorch: hidden states, logits, interpolated positions, and files saved back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
from safetensors import safe_open

from lora_jax.interop.hf import save_pretrained
from lora_jax.models.load import load_model
from tests import tiny

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::lora_jax.errors.InputWarning")]


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WIDE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_of(family: str, sizes: dict[str, Any], **more: Any) -> Any:
    """A config of transformers."""
    if family in ("CLIP", "Siglip"):
        inner = getattr(transformers, f"{family}VisionConfig")(intermediate_size=40, **sizes, **more)
        return getattr(transformers, f"{family}Config")(vision_config=inner.to_dict(), text_config=TEXT, num_labels=5)
    return getattr(transformers, f"{family}Config")(num_labels=5, **sizes, **more)


CASES = {
    "vit": ("ViT", SMALL, {"intermediate_size": 40}),
    "vit-no-bias": ("ViT", WIDE, {"intermediate_size": 64, "qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-6}),
    "deit": ("DeiT", SMALL, {"intermediate_size": 40}),
    "deit-grey": ("DeiT", WIDE, {"intermediate_size": 64, "num_channels": 1}),
    "dinov2": ("Dinov2", WIDE, {}),
    "dinov2-swiglu": ("Dinov2", SMALL, {"use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False}),
    "registers": ("Dinov2WithRegisters", WIDE, {"num_register_tokens": 3}),
    "registers-swiglu": ("Dinov2WithRegisters", SMALL, {"use_swiglu_ffn": True, "num_register_tokens": 1}),
    "siglip": ("Siglip", SMALL, {}),
    "siglip-no-pool": ("Siglip", WIDE, {"vision_use_head": False}),
    "clip": ("CLIP", SMALL, {}),
    "clip-gelu": ("CLIP", WIDE, {"hidden_act": "gelu"}),
}


def saved(case: str, folder: Path) -> Any:
    """transformers' classifier with weights that are all drawn at random, and its folder."""
    family, sizes, more = CASES[case]
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{family}ForImageClassification")(config_of(family, sizes, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def pixels_of(model: Any, side: int) -> tuple[np.ndarray, Any]:
    """Random pixels, ours (batch, height, width, channels) and PyTorch's."""
    vision = getattr(model.config, "vision_config", model.config)
    ours = np.random.default_rng(side).normal(size=(2, side, side + 14 if side > 60 else side, vision.num_channels)).astype(np.float32)
    return ours, torch.from_numpy(ours.transpose(0, 3, 1, 2).copy())


def computed(model: Any, pixels: np.ndarray) -> jax.Array:
    """What the model gives, in one compiled program: eagerly its operations would be compiled one by one."""
    return jax.jit(lambda x: model(x))(pixels)


def options(model: Any) -> dict[str, bool]:
    """What asks transformers for interpolated positions, where that is not done anyway."""
    return {} if "dinov2" in model.config.model_type else {"interpolate_pos_encoding": True}


@pytest.mark.parametrize("case", [c if "-" not in c else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_hidden_states_logits_and_files_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "theirs")
    base = load_model(str(tmp_path / "theirs"))
    tower = theirs.vision_model if hasattr(theirs, "vision_model") else theirs.base_model
    own = getattr(theirs.config, "vision_config", theirs.config).image_size
    for side in (own, 70 if own % 14 else 28):  # the table's own size, and a larger oblong or a smaller square
        ours, torchs = pixels_of(theirs, side)
        with torch.no_grad():
            wanted = tower(torchs, **options(theirs)).last_hidden_state.numpy()
        assert np.abs(np.asarray(computed(base, ours)) - wanted).max() < 1e-4, side

    ours, torchs = pixels_of(theirs, own)
    with torch.no_grad():
        wanted = theirs(torchs).logits.numpy()
    model = load_model(str(tmp_path / "theirs"), head="image_classification")
    assert np.abs(np.asarray(computed(model, ours)) - wanted).max() < 1e-4

    save_pretrained(model, tmp_path / "ours")
    with safe_open(tmp_path / "theirs/model.safetensors", "np") as a, safe_open(tmp_path / "ours/model.safetensors", "np") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(a.get_tensor(n).tobytes() == b.get_tensor(n).tobytes() for n in set(a.keys()))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(torchs).logits, theirs(torchs).logits)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "SiglipVisionModel", "CLIPVisionModel"])
def test_a_bare_base_is_saved_back_with_what_it_computes_nothing_with(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    theirs = kind(kind.config_class(**SMALL)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    base = load_model(str(tmp_path / "theirs"))
    ours, torchs = pixels_of(theirs, 32)
    with torch.no_grad():
        assert np.abs(np.asarray(computed(base, ours)) - theirs(torchs).last_hidden_state.numpy()).max() < 1e-4
    save_pretrained(base, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [name]
    with safe_open(tmp_path / "theirs/model.safetensors", "np") as a, safe_open(tmp_path / "ours/model.safetensors", "np") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(a.get_tensor(n).tobytes() == b.get_tensor(n).tobytes() for n in set(a.keys()))


SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not (SHARED / "models/dinov2_small").is_dir(), reason="needs ../shared/models")
@pytest.mark.parametrize("side", [224, 112])
def test_a_real_dinov2_has_the_hidden_states_of_transformers(side: int) -> None:
    source = str(SHARED / "models/dinov2_small")
    theirs = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    ours = np.random.default_rng(side).normal(size=(1, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ours.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    assert np.abs(np.asarray(computed(load_model(source), ours)) - wanted).max() < 1e-3
