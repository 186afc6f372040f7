"""LoRA-FA beside PEFT's optimizer, in which it is; and its files, which are LoRA's."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax import nnx

from lora_jax import inject, load_model, load_peft, save_peft
from lora_jax.adapters.partition import partition
from lora_jax.training.optimizer import hyper_of, make_optimizer
from tests import tiny
from tests.interop.test_peft_files import our_logits, their_logits
from tests.interop.zoo import Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

INPUTS, OUTPUTS, RANK, STEPS, RATE = 13, 11, 3, 20, 1e-2


def test_twenty_steps_of_pefts_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round the gradient
    rng = np.random.default_rng(0)
    x, wanted = (rng.standard_normal((7, n)).astype(np.float32) for n in (INPUTS, OUTPUTS))
    layer = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
    values = {"rank": RANK, "alpha": 5.0, "targets": ["0"]}
    part = partition(inject(nnx.Sequential(layer), tiny.adapter(method="lora_fa", **values), rngs=nnx.Rngs(1)))
    (a_name,) = (name for name in part.settings if name.endswith("lora_a"))
    (b_name,) = part.trainable
    assert part.method is not None and b_name.endswith("lora_b")

    torch_layer = torch.nn.Linear(INPUTS, OUTPUTS)
    theirs = peft.get_peft_model(torch.nn.Sequential(torch_layer), peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0"]))
    module = theirs.base_model.model[0]
    with torch.no_grad():
        torch_layer.weight.copy_(torch.tensor(np.array(layer.kernel[...].T)))
        torch_layer.bias.copy_(torch.tensor(np.array(layer.bias[...])))
        module.lora_A["default"].weight.copy_(torch.tensor(np.array(part.settings[a_name].T)))
    optimizer = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=5, lr=RATE)
    reference = []
    for _ in range(STEPS):
        loss = ((theirs(torch.tensor(x)) - torch.tensor(wanted)) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.append(float(loss.detach()))

    adapter = {f"adapter__{key}": value for key, value in values.items()}
    options = {"optimizer__schedule": "constant", "optimizer__learning_rate": RATE, "optimizer__eps": 1e-6}
    hyper = hyper_of(tiny.config(adapter__method="lora_fa", **adapter, **options), STEPS)
    ours = make_optimizer(hyper, part, part.sites(part.trainable, part.settings))

    def loss_of(trainable):
        return ((part.merge(trainable, part.settings, part.frozen, training=True)(x) - wanted) ** 2).sum()

    @jax.jit
    def step(trainable, state):
        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        updates, state = ours.update(gradients, state, trainable)
        return {name: a + updates[name] for name, a in trainable.items()}, state, loss

    trainable, state, losses = part.trainable, ours.init(part.trainable), []
    for _ in range(STEPS):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, reference, rtol=1e-4)
    assert losses[-1] < losses[0]
    assert tiny.relative(trainable[b_name].T, module.lora_B["default"].weight.detach().numpy()) < 1e-3


def test_its_files_are_loras(zoo: Zoo, tmp_path: Path) -> None:
    base = load_model(str(zoo.source("llama-gqa-bias")))
    adapted = inject(base, tiny.adapter(method="lora_fa", rank=4, targets=["q_proj", "down_proj"]), rngs=nnx.Rngs(0))
    for _, variable in nnx.iter_graph(adapted):
        if isinstance(variable, nnx.LoRAParam):
            variable[...] = 0.1 * jax.random.normal(jax.random.key(variable.size), variable.shape)
    save_peft(adapted, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(zoo.model("llama-gqa-bias"), str(tmp_path / "ours")).eval()
    assert np.abs(our_logits(adapted) - our_logits(base)).max() > 0.01
    assert np.abs(our_logits(adapted) - their_logits(theirs)).max() < 1e-4
    assert np.abs(our_logits(load_peft(base, tmp_path / "ours")) - our_logits(adapted)).max() < 1e-6
