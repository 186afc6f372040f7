"""Vision transformers' linear sites against Hugging Face PEFT: files both ways, and a training curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lora_jax import load_model, load_peft, save_peft
from lora_jax.adapters.inject import remember
from lora_jax.adapters.merge import merged_base
from lora_jax.packing.pack import Pack
from tests import tiny
from tests.interop.test_peft_curve import TOLERANCE, config
from tests.interop.test_vision_families import computed, pixels_of, saved

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # PEFT warns of much that is meant

OPTIONS: dict[str, Any] = {
    "lora": lambda **o: peft.LoraConfig(r=3, lora_alpha=5, **o),
    "dora": lambda **o: peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, use_rslora=True, **o),
}


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def linears(model: Any) -> list[str]:
    """A pattern for every linear layer of the base."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "classifier" not in name]


@pytest.mark.parametrize(("case", "method"), [("vit", "lora"), ("vit", "dora"), pytest.param("dinov2", "dora", marks=pytest.mark.long)])
def test_files_both_ways(case: str, method: str, tmp_path: Path) -> None:
    base = saved(case, tmp_path / "base")
    options = OPTIONS[method](target_modules=linears(base), modules_to_save=["classifier"])
    theirs = peft.get_peft_model(base, options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.1 * torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, torchs = pixels_of(base, 32 if case == "vit" else 42)
    with torch.no_grad():
        wanted = theirs(torchs).logits.numpy()
    model = load_model(str(tmp_path / "base"), head="image_classification")
    adapted = load_peft(model, tmp_path / "theirs")
    bound = 1e-4 * max(1, float(np.abs(wanted).max()))
    assert np.abs(wanted - np.asarray(computed(model, ours))).max() > 100 * bound
    assert np.abs(np.asarray(computed(adapted, ours)) - wanted).max() < bound
    assert np.abs(np.asarray(computed(merged_base(adapted), ours)) - wanted).max() < bound
    save_peft(adapted, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "ours"
    ).eval()
    with torch.no_grad():
        assert torch.allclose(again(torchs).logits, theirs(torchs).logits, rtol=0, atol=bound / 100)


def test_a_training_curve_of_a_vision_transformer(tmp_path: Path) -> None:
    """PEFT starts from the adapter that was drawn here, and both see the same batches."""
    steps, rate, side = 20, 3e-3, 32
    saved("vit", tmp_path / "base")
    model: Any = load_model(str(tmp_path / "base"), head="image_classification")
    own = config({"rank": 3, "alpha": 6, "targets": "all-linear"}, {"learning_rate": rate})
    pack = Pack.build(model, [own], steps)
    start, settings = (jax.tree.map(lambda a: a[0], tree) for tree in (pack.state.trainable, pack.fixed.settings))
    adapted = pack.part.merge(start, settings, pack.part.frozen, training=False)
    remember(adapted, own.adapter)
    save_peft(adapted, tmp_path / "start")
    base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).train()
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (steps, 8, side, side, 3), np.uint8), rng.integers(0, 5, (steps, 8))
    length = model.base.tokens((side, side))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    state, found, wanted = pack.state, [], []
    for step, (p, y) in enumerate(zip(pixels, labels, strict=True)):
        batch = {
            "segment_ids": np.ones((8, length), np.int32),
            "pixels": p,
            "target_index": np.arange(8, dtype=np.int32) * length,
            "target_ids": y.astype(np.int32),
            "target_weights": np.ones(8, np.float32),
        }
        inputs = {name: array[None] for name, array in batch.items()}
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, inputs, np.int32(step))
        found.append(float(metrics.loss[0]))
        x = torch.from_numpy(np.asarray(model.base.normalised(p)).transpose(0, 3, 1, 2).copy())
        loss = theirs(pixel_values=x, labels=torch.from_numpy(y)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert abs(wanted[0] - wanted[-1]) > 0.05
    np.testing.assert_allclose(found, wanted, rtol=max(1e-3, TOLERANCE))
