"""Convolution sites against Hugging Face PEFT: files both ways, what is refused, and a training curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from flax import nnx

from lora_jax import InputError, LoraConfig, inject, load_model, load_peft, save_peft
from lora_jax.adapters.inject import site_modules
from lora_jax.adapters.merge import merged_base
from lora_jax.config.doors import METHODS
from lora_jax.packing.pack import Pack
from tests import tiny
from tests.interop.test_convolutional_families import CASES, computed, pixels_of, shake
from tests.interop.test_peft_curve import TOLERANCE, config

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # PEFT warns of much that is meant

# Family -> modules of transformers' model.
TARGETS = {"resnet": ["convolution"], "efficientnet": ["expand_conv", "project_conv", "reduce", "embeddings.convolution"]}
OPTIONS: dict[str, Any] = {
    "lora": lambda **o: peft.LoraConfig(r=3, lora_alpha=5, rank_pattern={"reduce": 2}, **o),
    "dora": lambda **o: peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, use_rslora=True, **o),
    "loha": lambda **o: peft.LoHaConfig(r=2, alpha=3, **o),
}


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def saved(case: str, folder: Path) -> Any:
    """transformers' classifier of random numbers, and its folder."""
    family, options = CASES[case]
    torch.manual_seed(3)
    model = shake(
        getattr(transformers, f"{family}ForImageClassification")(getattr(transformers, f"{family}Config")(num_labels=5, **options))
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("case", "method"),
    [("resnet", "lora"), ("efficientnet", "dora")]
    + [pytest.param(*pair, marks=pytest.mark.long) for pair in [("resnet", "dora"), ("efficientnet", "lora"), ("resnet", "loha")]],
)
def test_files_both_ways(case: str, method: str, tmp_path: Path) -> None:
    base = saved(case, tmp_path / "base")
    theirs = peft.get_peft_model(base, OPTIONS[method](target_modules=TARGETS[case], modules_to_save=["classifier"])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.1 * torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, torchs = pixels_of(32, 40)
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


def test_an_adapter_made_here_is_pefts(tmp_path: Path) -> None:
    saved("resnet-basic", tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    adapted = inject(model, LoraConfig(rank=2, targets="convolutions", exclude=["shortcut"], alpha=8), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for site in site_modules(adapted).values():
        site.lora_b.set_value(rng.standard_normal(site.lora_b.shape).astype(np.float32))
    save_peft(adapted, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    ours, torchs = pixels_of(32, 32, 1)
    with torch.no_grad():
        wanted = theirs(pixel_values=torchs).last_hidden_state.numpy().transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(computed(adapted, ours)) - wanted).max() < 1e-4 * max(1, float(np.abs(wanted).max()))


def test_what_peft_would_not_compute_is_refused(tmp_path: Path) -> None:
    saved("efficientnet", tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    with pytest.raises(InputError, match=r"'depthwise' means .*, which cannot be adapted: a grouped convolution"):
        inject(model, LoraConfig(targets=["depthwise"]), rngs=nnx.Rngs(0))
    section = METHODS.get("adalora", "method").section(targets=["project"], rank=2, target_r=1)
    with pytest.raises(InputError, match="project_conv is a convolution, which PEFT's type ADALORA does not adapt"):
        save_peft(inject(model, section, rngs=nnx.Rngs(0)), tmp_path / "no")
    saved("convnext", tmp_path / "next")
    grouped = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(tmp_path / "next"), peft.LoraConfig(r=48, target_modules=["dwconv"])
    )
    grouped.save_pretrained(tmp_path / "grouped")
    with pytest.raises(InputError, match="'target_modules' matches no module of the model"):
        load_peft(load_model(str(tmp_path / "next")), tmp_path / "grouped")
    own = nnx.Dict(conv=nnx.Conv(4, 4, (3, 3), kernel_dilation=2, rngs=nnx.Rngs(0)))
    adapted = inject(own, LoraConfig(targets=["conv"], rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="conv is a convolution with dilation, which PEFT leaves out of its A"):
        save_peft(adapted, tmp_path / "no")


@pytest.mark.parametrize("train", [False, True], ids=["running statistics", "batch statistics"])
def test_a_training_curve_of_a_resnet(train: bool, tmp_path: Path) -> None:
    """Batch norms with their running statistics, or with each batch's own: PyTorch's train mode."""
    steps, rate = 20, 3e-3
    base = saved("resnet-basic", tmp_path / "base")
    model: Any = load_model(str(tmp_path / "base"), head="image_classification", train_batch_stats=train)
    pack = Pack.build(model, [config({"rank": 3, "alpha": 6, "targets": "convolutions"}, {"learning_rate": rate})], steps)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["convolution"], modules_to_save=["classifier"]))
    trainable = {name: np.asarray(a[0]) for name, a in pack.state.trainable.items()}
    names = {s.site.name: (s.site.names[0][-1], s.site.window) for s in pack.structure.sites}
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for site, (name, window) in names.items():
            (module,) = [m for n, m in modules.items() if n.endswith("." + name) and hasattr(m, "lora_A")]
            a, b = trainable[f"{site}.lora_a"], trainable[f"{site}.lora_b"]
            module.lora_A["default"].weight.copy_(torch.tensor(a.T.reshape(3, *window, -1).transpose(0, 3, 1, 2).copy()))
            module.lora_B["default"].weight.copy_(torch.tensor(b.T[:, :, None, None].copy()))
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (steps, 8, 32, 32, 1), np.uint8), rng.integers(0, 5, (steps, 8))
    batches = [
        {
            "segment_ids": np.ones((8, 1), np.int32),
            "pixels": p,
            "target_index": np.arange(8, dtype=np.int32),
            "target_ids": y.astype(np.int32),
            "target_weights": np.ones(8, np.float32),
        }
        for p, y in zip(pixels, labels, strict=True)
    ]
    state, found = pack.state, []
    for i, batch in enumerate(batches):
        inputs = {k: v[None] for k, v in batch.items()}
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, inputs, np.int32(i))
        found.append(float(metrics.loss[0]))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    theirs.train(train)
    wanted = []
    for p, y in zip(pixels, labels, strict=True):
        x = torch.from_numpy(np.asarray(model.base.normalised(p)).transpose(0, 3, 1, 2).copy())
        loss = theirs(pixel_values=x, labels=torch.from_numpy(y)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert abs(wanted[0] - wanted[-1]) > 0.05
    np.testing.assert_allclose(found, wanted, rtol=max(1e-3, TOLERANCE))
    running = {name: a[0] for name, a in state.trainable.items() if name.endswith((".mean", ".var"))}
    assert bool(running) == train
    if train:
        tensors = [t.numpy() for n, t in theirs.named_buffers() if n.endswith(("running_mean", "running_var"))]
        own, their_own = (sorted(float(np.sum(a)) for a in each) for each in (running.values(), tensors))
        np.testing.assert_allclose(own, their_own, rtol=1e-3, atol=1e-3)
        trainable, settings = (jax.tree.map(lambda a: a[0], tree) for tree in (state.trainable, pack.fixed.settings))
        with pytest.raises(InputError, match="running statistics of its own"):
            save_peft(pack.part.merge(trainable, settings, pack.part.frozen, training=False), tmp_path / "no")
