"""Adapters whose every trained number is drawn, as if they had been trained, with their padding left at 0."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(model: nnx.Module) -> nnx.Module:
    """In place: every trained number moved, padding left at 0; gives the model without its dropout."""
    rng = np.random.default_rng(3)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and variable.get_metadata().get("label", "frozen") != "frozen":
            value = np.array(variable[...])
            noise = 0.1 * rng.standard_normal(value.shape).astype(value.dtype)
            if path[-1] == "lora_b":  # rows that A's padding does not reach stay 0
                a = np.array(_owner(model, path).lora_a[...])
                noise *= (np.abs(a).sum(-2) > 0)[..., None] if path[-2] != "embed" else 1
            variable.set_value(jnp.asarray(value + noise * (value != 0 if path[-1] == "lora_a" and path[-2] != "embed" else 1)))
    return nnx.view(model, deterministic=True, raise_if_not_found=False)


def _owner(model: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model
