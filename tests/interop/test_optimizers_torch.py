"""The optimizers that PyTorch has too, over ten steps."""

from __future__ import annotations

import types
from typing import Any

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from lora_jax.training.optimizer import hyper_of, make_optimizer
from tests import tiny

pytestmark = pytest.mark.interop

STEPS = 10
RATE = {"lr": 0.05, "weight_decay": 0.1}
CASES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("adamw", {"b2": 0.95}, torch.optim.AdamW, {"betas": (0.9, 0.95)}),
    ("sgd", {"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    ("sgd", {"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    ("adafactor", {"parameter_scale": True}, torch.optim.Adafactor, {"eps": (1e-15, 1e-3)}),
]


@pytest.mark.parametrize(("kind", "ours", "theirs", "options"), CASES)
def test_equals_pytorchs(kind: str, ours: dict[str, Any], theirs: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    start, *grads = ({n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (6, 3)), ("b", (3, 5)))} for _ in range(STEPS + 1))
    values = ours | {"kind": kind, "learning_rate": RATE["lr"], "weight_decay": RATE["weight_decay"], "schedule": "constant"}
    part: Any = types.SimpleNamespace(labels={"a": "adapter_a", "b": "adapter_b"}, parameters={}, axes={}, method=None)
    optimizer = make_optimizer(hyper_of(tiny.config(**{f"optimizer__{k}": v for k, v in values.items()}), STEPS), part)
    params: Any = start
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    peer = theirs(tensors.values(), **RATE, **options)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(g[name])
        peer.step()
    for name, tensor in tensors.items():
        assert tiny.relative(params[name] - start[name], tensor.detach().numpy() - start[name]) < 1e-5, name
