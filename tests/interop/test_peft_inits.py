"""Adapters that began in other ways, beside PEFT: the same factors from the same weight, and files that compute the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from flax import nnx

from lora_jax import LoraConfig, inject, load_peft, merge, save_peft, save_pretrained
from lora_jax.adapters.inject import fill_member, inject_layout, remember, site_modules
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.merge import plain, strip
from lora_jax.adapters.parameters import Statistics
from lora_jax.adapters.sites import find_sites
from lora_jax.config.doors import INITS
from lora_jax.errors import InputError
from tests.interop.drawing import drawn
from tests.interop.test_peft_files import TOLERANCE, our_logits, our_model, their_logits
from tests.interop.zoo import Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

MODELS = ("llama-gqa-bias", "gpt2-untied")
SPLITS = [name for name, init in INITS.all().items() if init.splits]


def ours(base: nnx.Module, **values: Any) -> nnx.Module:
    """An adapted model at its start; what the data would say is made up."""
    config = LoraConfig(**({"rank": 4, "alpha": 6, "targets": ["o_proj", "down_proj"]} | values))
    member = resolve(base, config)
    adapted = inject_layout(base, unite(base, [member]))
    rng, seen = np.random.default_rng(0), {}
    for site in find_sites(base):
        for layer in range(site.depth or 1):
            x = rng.standard_normal((2 * site.inputs, site.inputs)) if site.inputs < 1000 else np.zeros((0, 0))
            seen[site.name, layer] = Statistics(x.T @ x, rng.standard_normal((site.inputs, site.outputs)), len(x))
    fill_member(adapted, member, 0, seen)
    remember(adapted, config)
    return adapted


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_they_leave_as_lora_of_twice_the_rank(name: str, init: str, rslora: bool, zoo: Zoo, tmp_path: Path) -> None:
    base = our_model(zoo, name)
    adapted = drawn(ours(base, init=init, rslora=rslora, rank_pattern={r".*1\..*o_proj": 2}))
    expected = our_logits(adapted)
    assert np.abs(our_logits(base) - expected).max() > 0.02
    save_peft(adapted, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(zoo.model(name), str(tmp_path / "ours")).eval()
    assert np.abs(expected - their_logits(model)).max() < TOLERANCE
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 8 and set(config["rank_pattern"].values()) == {4} and config["init_lora_weights"] is True
    assert np.abs(our_logits(load_peft(base, tmp_path / "ours")) - expected).max() < TOLERANCE
    assert np.abs(our_logits(merge(adapted)) - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_or_as_they_are_with_a_base_of_their_own(name: str, zoo: Zoo, tmp_path: Path) -> None:
    adapted = drawn(ours(our_model(zoo, name), init="pissa"))
    other = plain(adapted, shifted=True)
    save_peft(other, tmp_path / "ours")
    save_pretrained(strip(other), tmp_path / "base", dtype="float32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert np.abs(our_logits(adapted) - their_logits(model)).max() < TOLERANCE
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 4
    assert plain(other) is other


@pytest.mark.parametrize("theirs", ["pissa", "olora", "pissa_niter_400", "mica"])
def test_factors_are_pefts(theirs: str, zoo: Zoo) -> None:
    name = "llama-gqa-bias"
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"], "init_lora_weights": theirs}
    model = peft.get_peft_model(zoo.model(name), peft.LoraConfig(**options))
    adapted = inject(our_model(zoo, name), LoraConfig(**options), rngs=nnx.Rngs(0))
    for site, where in (("layers.attn.o_proj", "self_attn.o_proj"), ("layers.mlp.down_proj", "mlp.down_proj")):
        mine = site_modules(adapted)[site]
        for layer in range(2):
            other = model.get_submodule(f"base_model.model.model.layers.{layer}.{where}")
            a, b = (getattr(other, f"lora_{x}")["default"].weight.detach().numpy().T for x in "AB")
            loose = 2e-2 if theirs.startswith("pissa_niter") else 1e-4  # of random vectors, others there
            if theirs == "mica":
                np.testing.assert_allclose(np.abs(mine.lora_b[...][layer]), np.abs(b), atol=1e-4)
                assert not np.any(mine.lora_a[...]) and not a.any()
            else:
                np.testing.assert_allclose(mine.lora_a[...][layer] @ mine.lora_b[...][layer], a @ b, atol=loose)
                if loose < 1e-3:
                    np.testing.assert_allclose(np.abs(mine.lora_a[...][layer]), np.abs(a), atol=1e-3)


def test_a_file_of_mica_is_read_and_written_again(zoo: Zoo, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "init_lora_weights": "mica", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(zoo.model("llama-gqa-bias"), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "theirs")
    adapted = load_peft(our_model(zoo, "llama-gqa-bias"), tmp_path / "theirs")
    assert np.abs(our_logits(adapted) - their_logits(model)).max() < TOLERANCE
    assert next(iter(site_modules(adapted).values())).method.frozen == "lora_b"
    save_peft(adapted, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(zoo.model("llama-gqa-bias"), str(tmp_path / "ours")).eval()
    assert np.abs(their_logits(again) - their_logits(model)).max() < TOLERANCE


def test_pefts_words() -> None:
    kind = lambda word: LoraConfig(r=4, lora_alpha=8, init_lora_weights=word).init
    words = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal", "mica": "mica", "OLoRA": "olora"}
    assert {word: kind(word).kind for word in words} == words
    assert kind("pissa_niter_16").niter == 16 and kind("pissa").niter is None
    assert LoraConfig(init="gaussian", targets=["q_proj"]).to_peft()["init_lora_weights"] == "gaussian"
    for word in (False, "kaiming"):
        with pytest.raises(InputError, match="init_lora_weights"):
            kind(word)
