"""Members over a user's own net, in a user's own loop: packed they train as each does alone, with convolutions too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
from lora_jax.adapters.inject import fill_member
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.members import Members, inject_members
from lora_jax.errors import InputError
from tests import tiny


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.up(jnp.tanh(self.conv(x)).mean((1, 2)))))


X = np.random.default_rng(1).standard_normal((12, 6, 5, 2)).astype(np.float32)
Y = np.arange(12) % 3


def net() -> Any:
    return tiny.random_model(lambda: Net(nnx.Rngs(0)))


def loss_of(model: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()


def pack_trained(members: Members, steps: int = 6) -> Any:
    """(members, ...) after some steps of Adam, in one program."""
    adam = optax.adam(3e-2)

    @jax.jit
    @jax.vmap
    def run(trainable: Any, settings: Any, masks: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            trainable, state = carry
            grads: Any = jax.grad(lambda t: loss_of(members.parts.merge(t, settings, members.parts.frozen, training=True)))(trainable)
            updates: Any
            updates, state = adam.update({n: g * masks.get(n, 1) for n, g in grads.items()}, state, trainable)
            updates = {n: u * masks.get(n, 1) for n, u in updates.items()}
            return (optax.apply_updates(trainable, updates), state), None

        return jax.lax.scan(step, (trainable, adam.init(trainable)), length=steps)[0][0]

    return run(members.trainable, members.settings, members.masks)


CONFIGS: dict[str, Sequence[dict[str, Any]]] = {
    "lora": [{"rank": 1, "targets": ["conv"]}, {"rank": 5, "alpha": 20, "targets": ["conv", "up"]}],
    "oft": [{"rank": 2, "targets": ["up"]}, {"rank": 3, "targets": ["up"]}],  # its padding needs masks
}


@pytest.mark.parametrize("method", ["lora", pytest.param("oft", marks=pytest.mark.slow)])
def test_members_train_as_an_adapter_of_their_own(method: str) -> None:
    base, configs = net(), [tiny.adapter(method=method, **config) for config in CONFIGS[method]]
    members = inject_members(base, configs, seeds=range(len(configs)))
    trained = pack_trained(members)
    for k, config in enumerate(configs):
        alone: Any = lora_jax.inject(base, config, rngs=nnx.Rngs(0))
        fill_member(alone, resolve(base, config), k)
        start: Any = members.model(k)
        np.testing.assert_allclose(start(X), base(X), atol=1e-5)
        optimizer = nnx.Optimizer(alone, optax.adam(3e-2), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> None:
            optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))

        for _ in range(6):
            step(alone, optimizer)
        own: Any = members.model(k, trained)
        ours, theirs = lora_jax.partition(own).trainable, lora_jax.partition(alone).trainable
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert ours[name].shape == array.shape and np.abs(array).max() > 0
            np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(lora_jax.merge(own)(X), alone(X), atol=1e-5)  # pyright: ignore[reportCallIssue]


def test_wrong_members() -> None:
    base, one = net(), tiny.adapter(rank=2, targets=["up"])
    with pytest.raises(InputError, match="0 configs and 0 seeds"):
        inject_members(base, [])
    with pytest.raises(InputError, match="1 configs and 2 seeds"):
        inject_members(base, [one], seeds=(0, 1))
    with pytest.raises(InputError, match="members differ in method"):
        inject_members(base, [one, tiny.adapter(method="dora", rank=2, targets=["up"])])
    with pytest.raises(InputError, match="'upp' matches no"):
        inject_members(base, [tiny.adapter(rank=2, targets=["upp"])])
