"""Tiny vision checkpoints and images of the tests: no download, no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.models.families import find_family
from lora_jax.models.tensors import base_tensors
from lora_jax.weights.provenance import Origin
from lora_jax.weights.safetensors import write_checkpoint

SIDE = 16
HF: dict[str, dict[str, Any]] = {
    "vit": {"intermediate_size": 64},
    "dinov2": {"mlp_ratio": 2},
    "siglip_vision_model": {"intermediate_size": 64},
    "resnet": {"hidden_size": None, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
}


def save_vision(folder: Path, model_type: str = "vit", *, depth: int = 3, **more: Any) -> Path:
    """A random base of width 32 for images of 16 pixels, as a Hugging Face folder."""
    hf = {"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": depth, "image_size": SIDE}
    hf |= {"patch_size": 4} | HF[model_type] | more
    hf = {key: value for key, value in hf.items() if value is not None}
    family = find_family(hf, "tests")
    base = family.model(family.config(hf, jnp.float32), rngs=nnx.Rngs(0))
    base.origin = nnx.static(Origin.of("", hf, ""))
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, base_tensors(base), largest=2**30)
    (folder / "config.json").write_text(json.dumps(hf))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 2}
    channels = hf.get("num_channels", 3)
    processor |= {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def squares(count: int, *, seed: int = 0, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """(count, side, side, 3) uint8 noise that is red, green or blue, and which (count,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 90, (count, side, side, 3))
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 140
    return images.astype(np.uint8), labels


def save_squares(file: Path, count: int = 48, *, seed: int = 0, side: int = SIDE) -> Path:
    """The same as a .npz."""
    images, labels = squares(count, seed=seed, side=side)
    np.savez(file, images=images, labels=labels)
    return file


def save_folders(folder: Path, count: int = 12, *, split: str = "train", side: int = 20) -> Path:
    """The same as PNG files in a folder for each class."""
    from PIL import Image

    for i, (image, label) in enumerate(zip(*squares(count, side=side), strict=True)):
        place = folder / split / ("blue", "green", "red")[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    return folder
