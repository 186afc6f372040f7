"""AdaLoRA beside PEFT's: the same losses and the same ranks while the budget falls, and the file of what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from lora_jax import load_model, load_peft, merge, save_peft
from lora_jax.adapters.partition import partition
from lora_jax.weights.safetensors import SafetensorsCheckpoint
from tests.interop.test_peft_files import TOKENS, assert_same_files, our_logits, their_logits
from tests.interop.zoo import Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

BASE, STEPS, RATE = "llama-gqa-bias", 30, 1e-2
SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 4, "tfinal": 6, "deltaT": 3, "beta1": 0.8, "beta2": 0.7, "orth_reg_weight": 0.3}


@pytest.fixture(scope="module")
def trained(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float], list[dict[str, np.ndarray]], Path]:
    """PEFT's model after the last step, its losses, its E after each step, and its adapter as it was at the start."""
    torch.manual_seed(1)
    options = SCHEDULE | {"lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "total_step": STEPS}
    model = peft.get_peft_model(zoo.model(BASE), peft.AdaLoraConfig(task_type="CAUSAL_LM", **options))
    folder = tmp_path_factory.mktemp("adalora") / "start"
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses, singular, tokens = [], [], torch.tensor(TOKENS).long()
    for step in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        losses.append(float(loss.detach()))
        singular.append({name: p.detach().numpy().copy() for name, p in model.named_parameters() if "lora_E" in name})
    return model.eval(), losses, singular, folder


def test_ranks_fall_as_in_peft(trained, zoo: Zoo) -> None:
    _, losses, singular, folder = trained
    part = partition(load_peft(load_model(str(zoo.source(BASE))), folder))
    method, optimizer = part.method, optax.adamw(RATE, weight_decay=0.0)
    assert method is not None

    def loss_of(trainable: Any) -> jax.Array:
        model: Any = part.merge(trainable, part.settings, part.frozen, training=True)
        penalty = method.penalty(part.sites(trainable, part.settings))
        assert penalty is not None
        told = jax.nn.log_softmax(model(TOKENS)[:, :-1])
        return penalty - jnp.take_along_axis(told, TOKENS[:, 1:, None], -1).mean()

    @jax.jit
    def train(trainable: Any, state: Any, kept: Any, step: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        sites = part.sites(trainable, part.settings)
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        kept, trainable = method.after_step(kept, trainable, gradients, sites, step, jnp.float32(STEPS))
        return trainable, state, kept, loss

    trainable, state, counts = part.trainable, optimizer.init(part.trainable), []
    kept = method.init_state(part.sites(trainable, part.settings))
    for step in range(STEPS):
        trainable, state, kept, loss = train(trainable, state, kept, jnp.int32(step))
        assert float(loss) == pytest.approx(losses[step], rel=1e-4)
        counts.append(0)
        for name, array in trainable.items():
            if name.endswith("lora_e"):
                for layer, ours in enumerate(np.asarray(array)):
                    (theirs,) = [v for n, v in singular[step].items() if f"layers.{layer}." in n and name.split(".")[-2] in n]
                    np.testing.assert_array_equal(ours != 0, theirs[:, 0] != 0, str((step, name, layer)))
                    np.testing.assert_allclose(ours, theirs[:, 0], atol=1e-4)
                    counts[-1] += int((ours != 0).sum())
    layers = len(singular[0])
    assert counts[5] == 4 * layers > counts[6] and counts[-1] == layers  # the first cut, and what is left


def test_what_is_left_is_in_the_file(trained, zoo: Zoo, tmp_path: Path) -> None:
    model, *_ = trained
    model.save_pretrained(tmp_path / "theirs")
    pattern = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {sum(kept) for kept in pattern.values()}
    assert len(ranks) > 1 and all(len(kept) == 4 for kept in pattern.values())
    file = SafetensorsCheckpoint(tmp_path / "theirs" / "adapter_model.safetensors", None)
    assert {file.shape(name)[0] for name in file.names() if name.endswith("lora_A")} == ranks
    base = load_model(str(zoo.source(BASE)))
    ours = load_peft(base, tmp_path / "theirs")
    assert np.abs(our_logits(ours) - our_logits(base)).max() > 0.01
    assert np.abs(our_logits(ours) - their_logits(model)).max() < 1e-4
    assert np.abs(our_logits(merge(ours)) - their_logits(model)).max() < 1e-4
    save_peft(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(zoo.model(BASE), str(tmp_path / "ours")).eval()
    assert np.abs(our_logits(ours) - their_logits(again)).max() < 1e-4
    if 0 not in ranks:
        assert_same_files(tmp_path / "theirs", tmp_path / "ours")
