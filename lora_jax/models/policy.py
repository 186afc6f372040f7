"""A policy: what an agent does, and what it expects of a state. A multi-layer perceptron, or a small convolutional net over images.

The net is a plain module (no stack): its linear layers `dense_0`, `dense_1`, ..., `actor` and `critic` are sites like any model's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..weights.provenance import Origin
from .layers import Array, activation, linear


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The shape of a policy.

    Attributes:
        observation: shape of one observation; (height, width, channels) where there are convolutions.
        actions: how many there are to choose from.
        hidden: widths of the linear layers before the two outputs, at least one.
        channels: of the 3 x 3 convolutions before them, each with as much padding as keeps the size; none for a perceptron.
        activation: after each of these layers, as `models/layers.py` calls it.
        dtype: of the weights and matmuls; what comes out is float32.
    """

    observation: tuple[int, ...]
    actions: int
    hidden: tuple[int, ...]
    channels: tuple[int, ...] = ()
    activation: str = "tanh"
    dtype: Any = jnp.float32

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the linear layers, in order."""
        *image, last = self.observation
        flat = math.prod(image) * (self.channels[-1] if self.channels else last)
        widths = (flat, *self.hidden)
        found = {f"dense_{i}": (widths[i], width) for i, width in enumerate(self.hidden)}
        return found | {"actor": (widths[-1], self.actions), "critic": (widths[-1], 1)}

    @property
    def convolutions(self) -> dict[str, tuple[int, int]]:
        """Name -> (channels in, channels out) of the convolutions, in order."""
        channels = (self.observation[-1], *self.channels)
        return {f"conv_{i}": (channels[i], out) for i, out in enumerate(self.channels)}


class Policy(nnx.Module):
    """Called as `policy(observations)`, (..., *observation) of any dtype, it gives logits (..., actions) and values (...,), both float32.

    New weights are orthogonal, of gain sqrt(2) before an activation, 0.01 for the actions and 1 for the value, and biases 0
    (as in the implementation of arXiv:1707.06347).

    Attributes:
        dropout: always 0: a policy has none.
        origin: the checkpoint it was loaded from; None of a new one.
    """

    is_decoder = False
    actor: nnx.Linear
    critic: nnx.Linear

    def __init__(self, config: PolicyConfig, *, rngs: nnx.Rngs):
        self.config = nnx.static(config)
        self.dropout = 0.0
        self.origin: Origin | None = nnx.static(None)
        self.head_shapes: tuple[Any, ...] = nnx.static(())
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())
        dtype = config.dtype
        for name, (inputs, outputs) in config.convolutions.items():
            init = nnx.initializers.orthogonal(math.sqrt(2))
            conv = nnx.Conv(inputs, outputs, (3, 3), padding="SAME", dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)
            setattr(self, name, conv)
        for name, (inputs, outputs) in config.layers.items():
            layer = linear(inputs, outputs, ("embed", "classes"), bias=True, dtype=dtype, rngs=rngs)
            gain = {"actor": 0.01, "critic": 1.0}.get(name, math.sqrt(2))
            layer.kernel[...] = nnx.initializers.orthogonal(gain)(rngs.params(), layer.kernel.shape, dtype)
            setattr(self, name, layer)

    def __call__(self, observations: Array) -> tuple[Array, Array]:
        """Logits (..., actions) and values (...,), float32."""
        config = self.config
        lead = observations.shape[: observations.ndim - len(config.observation)]
        x = observations.reshape(-1, *config.observation).astype(config.dtype)
        for name in config.convolutions:
            x = activation(config.activation, getattr(self, name)(x))
        x = x.reshape(x.shape[0], -1)
        for name in config.layers:
            if name.startswith("dense"):
                x = activation(config.activation, getattr(self, name)(x))
        logits, values = self.actor(x), self.critic(x)[..., 0]
        return logits.astype(jnp.float32).reshape(*lead, -1), values.astype(jnp.float32).reshape(lead)


def log_probability(logits: Array, actions: Array) -> Array:
    """(...,) float32: log p of the actions (..., ) int32 under logits (..., actions)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]
