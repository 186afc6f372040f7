"""The weights that a transform changes: the linear layers of a base, by name, one matrix at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from ...errors import InputError, hint
from ...parallel.mesh import place, to_host
from ..experts import ExpertLinear
from ..stack import Stack
from ..stored import StoredLinear

# A mixture's choice of experts: few numbers that decide much.
_LEFT = ("router",)
_INNER = "segments.0.block."


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a base, or the same one of every layer of a stack.

    Attributes:
        name: its path, without the layer: `layers.attn.q_proj`.
        path: where it stands.
        module: an `nnx.Linear`, or with a weight for each expert an `ExpertLinear`.
    """

    name: str
    path: tuple[Any, ...]
    module: Any

    @property
    def of_experts(self) -> bool:
        """Whether its weight has experts in front."""
        return isinstance(self.module, ExpertLinear)

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.module.kernel.shape[-2:]

    def matrices(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(layer, expert), as far as there are such axes, and a matrix (inputs, outputs) on the host, in the weight's dtype."""
        whole = self.module.kernel[...]
        for at in np.ndindex(*whole.shape[:-2]):
            yield at, to_host(whole[at])


def linear_layers(base: Any, skip: Sequence[str], key: str) -> list[LinearLayer]:
    """The linear layers of a base's stacks; of a base without any, all that it has. Embeddings, heads and routers are none.

    Args:
        base: the base.
        skip: names of those to leave out: each is the whole path or its end, cut at a dot, ours or Hugging Face's.
        key: of the config, for messages.

    Raises:
        InputError: a name in `skip` is no layer's, none is left, or a transform listed before holds them in another form.
    """
    modules = dict(nnx.iter_modules(base))
    stacks = [path for path, module in modules.items() if isinstance(module, Stack)]
    aliases = dict(getattr(base, "site_aliases", ()))
    found, names = [], {}
    for path, module in modules.items():
        inside = not stacks or any(path[: len(stack)] == stack for stack in stacks)
        if not inside or not isinstance(module, nnx.Linear | ExpertLinear | StoredLinear) or path[-1] in _LEFT:
            continue
        name = ".".join(map(str, path)).replace(_INNER, "")
        names[name] = (name, aliases.get(name, name).replace("{i}.", ""))
        if any(_ends(own, entry) for own in names[name] for entry in skip):
            continue
        if isinstance(module, StoredLinear):
            why = "a transform listed before this one (list this one first), or model.quantized: keep"
            raise InputError(f"{key}: {name} is held in another form than one array, by {why}.")
        found.append(LinearLayer(name, path, module))
    for entry in skip:
        if not any(_ends(own, entry) for both in names.values() for own in both):
            ends = sorted({own.rsplit(".", 1)[-1] for both in names.values() for own in both})
            raise InputError(f"{key}.skip: '{entry}' is no linear layer. {hint(entry, ends)}".rstrip())
    if not found:
        raise InputError(f"{key}.skip: leaves no linear layer." if names else f"{key}: the model has no linear layer to change.")
    return sorted(found, key=lambda layer: layer.name)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def set_like(variable: nnx.Variable, value: np.ndarray) -> None:
    """Sets a variable to an array from the host, in its own dtype and where it lies."""
    held: jax.Array = variable[...]
    lies, value = held.sharding, value.astype(held.dtype)
    variable.set_value(place(value, lies) if isinstance(lies, NamedSharding) else jnp.asarray(value))
