"""Families of convolutional nets against transformers on PyTorch, and timm's layouts against a transcription: outputs and files."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lora_jax.errors import InputError
from lora_jax.interop.hf import save_pretrained
from lora_jax.models.load import load_model
from tests import tiny

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::lora_jax.errors.InputWarning")]


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


EFFICIENT = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "kernel_sizes": [3, 5, 3], "strides": [1, 2, 2]}
EFFICIENT |= {"in_channels": [32, 16, 24], "out_channels": [16, 24, 32], "num_block_repeats": [1, 2, 2], "expand_ratios": [1, 6, 4]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32, 24], "depths": [2, 1, 2]}),
    "resnet-basic": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_channels": 1}),
    "resnet-early": (
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "downsample_in_bottleneck": True}
        | {"downsample_in_first_stage": True},
    ),
    "efficientnet": ("EfficientNet", EFFICIENT),
    "efficientnet-wide": (
        "EfficientNet",
        EFFICIENT | {"width_coefficient": 0.6, "depth_coefficient": 1.4, "hidden_dim": 768, "depthwise_padding": [2], "hidden_act": "relu"},
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 12], "depths": [1, 2, 1], "num_stages": 3}),
    "convnext-plain": (
        "ConvNext",
        {"hidden_sizes": [8, 24], "depths": [2, 1], "num_stages": 2, "patch_size": 2, "layer_scale_init_value": 0.0}
        | {"layer_norm_eps": 1e-3},
    ),
}  # fmt: skip


def shake(model: Any) -> Any:
    """Numbers of all kinds in parameters and running statistics."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif tensor.dtype.is_floating_point and tensor.ndim > 1:
                tensor.copy_(torch.randn_like(tensor) / math.sqrt(math.prod(tensor.shape[1:])))
            elif tensor.dtype.is_floating_point:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def pixels_of(height: int, width: int, channels: int = 3) -> tuple[Any, Any]:
    """Random pixels, ours (batch, height, width, channels) and PyTorch's."""
    ours = np.random.default_rng(height).normal(size=(2, height, width, channels)).astype(np.float32)
    return ours, torch.from_numpy(ours.transpose(0, 3, 1, 2).copy())


def computed(model: Any, pixels: np.ndarray) -> jax.Array:
    """What the model gives, in one compiled program."""
    return jax.jit(lambda x: model(x))(pixels)


def same_files(a: Path, b: Path) -> None:
    with safe_open(a / "model.safetensors", "np") as theirs, safe_open(b / "model.safetensors", "np") as ours:
        assert set(theirs.keys()) == set(ours.keys())
        assert all(theirs.get_tensor(n).tobytes() == ours.get_tensor(n).tobytes() for n in set(theirs.keys()))


@pytest.mark.parametrize("case", [c if "-" not in c else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_feature_maps_logits_and_files_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    torch.manual_seed(len(case))
    config = getattr(transformers, f"{family}Config")(num_labels=5, **options)
    theirs = shake(getattr(transformers, f"{family}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path / "theirs")
    base = load_model(str(tmp_path / "theirs"))
    for side in ((32, 32), (48, 40)):
        ours, torchs = pixels_of(*side, config.num_channels)
        with torch.no_grad():
            wanted = theirs.base_model(torchs).last_hidden_state.numpy().transpose(0, 2, 3, 1)
        found = np.asarray(computed(base, ours))
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max()), side
    model: Any = load_model(str(tmp_path / "theirs"), head="image_classification")
    with torch.no_grad():
        wanted = theirs(torchs).logits.numpy()
    assert np.abs(wanted).max() > 0.1 and np.abs(np.asarray(computed(model, ours)) - wanted).max() < 1e-4
    save_pretrained(model, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(torchs).logits, theirs(torchs).logits)


class Timm:
    """Nets as timm has them, computed from a state dict; what is not there yet is drawn.

    Args:
        same: whether TensorFlow's "same" padding is used.
        act: the activation.
        eps: of the batch norms.
    """

    def __init__(self, act: Any, eps: float, same: bool = False):
        self.state: dict[str, Any] = {}
        self.act, self.eps, self.same = act, eps, same

    def draw(self, name: str, *shape: int) -> Any:
        if name not in self.state:
            drawn = torch.randn(shape) / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * torch.randn(shape)
            self.state[name] = 0.5 + torch.rand(shape) if name.endswith(("running_var", "norm.weight")) else drawn
            self.state[name] += 1.0 if ("bn" in name or "downsample.1" in name) and name.endswith(".weight") else 0.0
        return self.state[name]

    def conv(
        self, name: str, x: Any, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False, pad: int | None = None
    ) -> Any:
        weight = self.draw(f"{name}.weight", outputs, x.shape[1] // groups, kernel, kernel)
        b = self.draw(f"{name}.bias", outputs) if bias else None
        if self.same:
            needed = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
            x = F.pad(x, (needed[1] // 2, needed[1] - needed[1] // 2, needed[0] // 2, needed[0] - needed[0] // 2))
        return F.conv2d(x, weight, b, stride, 0 if self.same else kernel // 2 if pad is None else pad, groups=groups)

    def bn(self, name: str, x: Any) -> Any:
        mean, var, weight, bias = (self.draw(f"{name}.{n}", x.shape[1]) for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)

    def linear(self, name: str, x: Any, outputs: int) -> Any:
        return F.linear(x, self.draw(f"{name}.weight", outputs, x.shape[-1]), self.draw(f"{name}.bias", outputs))

    def resnet(self, x: Any, depths: tuple[int, ...], three: bool) -> Any:
        x = F.max_pool2d(self.act(self.bn("bn1", self.conv("conv1", x, 64, 7, 2))), 3, 2, 1)
        for stage, depth in enumerate(depths):
            for i in range(depth):
                name, stride, planes = f"layer{stage + 1}.{i}", 2 if stage and not i else 1, 64 * 2**stage
                outputs = planes * (4 if three else 1)
                y = self.act(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x, planes, 1 if three else 3, 1 if three else stride)))
                y = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", y, planes, 3, stride if three else 1))
                if three:
                    y = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", self.act(y), outputs, 1))
                if stride > 1 or x.shape[1] != outputs:
                    x = self.bn(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, outputs, 1, stride))
                x = self.act(x + y)
        return self.linear("fc", x.mean((2, 3)), 7)

    def efficientnet(self, x: Any, stem: int, stages: Any, top: int, squeeze: bool) -> Any:
        """Stages: (kernel, stride, expansion, channels, blocks) of each."""
        x = self.act(self.bn("bn1", self.conv("conv_stem", x, stem, 3, 2)))
        for stage, (kernel, stride, ratio, outputs, depth) in enumerate(stages):
            for i in range(depth):
                name, inputs, first, y = f"blocks.{stage}.{i}", x.shape[1], stride if i == 0 else 1, x
                if ratio > 1:
                    y = self.act(self.bn(f"{name}.bn1", self.conv(f"{name}.conv_pw", y, inputs * ratio, 1)))
                y = self.conv(f"{name}.conv_dw", y, y.shape[1], kernel, first, groups=y.shape[1])
                y = self.act(self.bn(f"{name}.bn{2 if ratio > 1 else 1}", y))
                if squeeze:
                    s = self.act(self.conv(f"{name}.se.conv_reduce", y.mean((2, 3), keepdim=True), inputs // 4, 1, bias=True))
                    y = y * torch.sigmoid(self.conv(f"{name}.se.conv_expand", s, y.shape[1], 1, bias=True))
                last = ("conv_pwl", "bn3") if ratio > 1 else ("conv_pw", "bn2")
                y = self.bn(f"{name}.{last[1]}", self.conv(f"{name}.{last[0]}", y, outputs, 1))
                x = x + y if first == 1 and inputs == outputs else y
        x = self.act(self.bn("bn2", self.conv("conv_head", x, top, 1)))
        return self.linear("classifier", x.mean((2, 3)), 7)

    def convnext(self, x: Any, width: int, depths: tuple[int, ...]) -> Any:
        def ln(name: str, x: Any) -> Any:
            return F.layer_norm(x, x.shape[-1:], self.draw(f"{name}.weight", x.shape[-1]), self.draw(f"{name}.bias", x.shape[-1]), 1e-6)

        def over_channels(name: str, x: Any) -> Any:
            return ln(name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        x = over_channels("stem.1", self.conv("stem.0", x, width, 4, 4, bias=True, pad=0))
        for stage, depth in enumerate(depths):
            if stage:
                x = over_channels(f"stages.{stage}.downsample.0", x)
                x = self.conv(f"stages.{stage}.downsample.1", x, width * 2**stage, 2, 2, bias=True, pad=0)
            for i in range(depth):
                name = f"stages.{stage}.blocks.{i}"
                y = self.conv(f"{name}.conv_dw", x, x.shape[1], 7, groups=x.shape[1], bias=True)
                y = ln(f"{name}.norm", y.permute(0, 2, 3, 1))
                y = self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", y, 4 * x.shape[1])), x.shape[1])
                x = x + (self.draw(f"{name}.gamma", x.shape[1]) * y).permute(0, 3, 1, 2)
        return self.linear("head.fc", ln("head.norm", x.mean((2, 3))), 7)


B0 = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
# Of efficientnet_b1: its blocks are 1.1 times as many, rounded up; of lite2: the channels 1.1 times, and the blocks 1.2 times.
B1 = tuple((k, s, e, c, d) for (k, s, e, c, _), d in zip(B0, (2, 3, 3, 4, 4, 5, 2), strict=True))
LITE2 = tuple((k, s, e, c, d) for (k, s, e, _, _), c, d in zip(B0, (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1), strict=True))
TIMM: dict[str, tuple[Any, Any]] = {
    "resnet18.a1_in1k": (Timm(F.relu, 1e-5), lambda t, x: t.resnet(x, (2, 2, 2, 2), False)),
    "resnet50": (Timm(F.relu, 1e-5), lambda t, x: t.resnet(x, (3, 4, 6, 3), True)),
    "efficientnet_b0": (Timm(F.silu, 1e-5), lambda t, x: t.efficientnet(x, 32, B0, 1280, True)),
    "tf_efficientnet_b1": (Timm(F.silu, 1e-3, same=True), lambda t, x: t.efficientnet(x, 32, B1, 1280, True)),
    "efficientnet_lite2": (Timm(F.relu6, 1e-5), lambda t, x: t.efficientnet(x, 32, LITE2, 1280, False)),
    "convnext_tiny": (Timm(None, 0.0), lambda t, x: t.convnext(x, 96, (3, 3, 9, 3))),
}


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", *(pytest.param(n, marks=pytest.mark.long) for n in TIMM if n != "resnet18.a1_in1k")])
def test_timms_layouts_by_a_transcription(name: str, tmp_path: Path) -> None:
    net, run = TIMM[name]
    torch.manual_seed(0)
    ours, torchs = pixels_of(40, 56)
    with torch.no_grad():
        wanted = run(net, torchs).numpy()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(net.state, theirs / "model.safetensors")
    labels = [f"class {i}" for i in range(7)]
    said = {"architecture": name, "num_classes": 7, "label_names": labels, "pretrained_cfg": {"input_size": [3, 56, 56]}}
    (theirs / "config.json").write_text(json.dumps(said))
    model: Any = load_model(str(theirs), head="image_classification")
    assert list(model.class_names) == labels
    found = np.asarray(computed(model, ours))
    assert np.abs(wanted).max() > 0.1 and np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    save_pretrained(model, tmp_path / "ours")
    same_files(theirs, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text()) == said


def test_what_timms_config_says_that_is_not_supported(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "model.safetensors")

    def refused(message: str, **said: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 7} | said))
        with pytest.raises(InputError, match=message):
            load_model(str(tmp_path))

    refused("architecture 'resnet81' is not supported. Did you mean 'resnet18'", architecture="resnet81")
    refused("model_args.bn_ep is not supported. Did you mean 'bn_eps'", model_args={"bn_ep": 1e-3})
    refused("model_args.pad_type = 'odd' is not supported", model_args={"pad_type": "odd"})
    refused("tensors are missing, among them bn1.bias, bn1.running_mean")


SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not (SHARED / "models/efficientnet_lite0").is_dir(), reason="needs ../shared/models")
@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn's photographs")
def test_the_real_efficientnet_lite0_knows_a_temple_and_a_flower() -> None:
    model: Any = load_model(str(SHARED / "models/efficientnet_lite0"), head="image_classification")
    (path,) = importlib.util.find_spec("sklearn").submodule_search_locations  # pyright: ignore[reportOptionalMemberAccess, reportGeneralTypeIssues]
    spec, batch = model.base.pixels, []
    for name in ("china.jpg", "flower.jpg"):
        image = Image.open(Path(path) / "datasets/images" / name).convert("RGB")
        scale = spec.resized[0] / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - spec.size[1]) // 2, (image.height - spec.size[0]) // 2
        batch.append(np.asarray(image.crop((left, top, left + spec.size[1], top + spec.size[0]))))
    temple, flower = np.argsort(-np.asarray(computed(model, np.asarray(model.base.normalised(np.stack(batch))))))[:, :3]
    assert temple[0] in (698, 442) and 985 in flower
