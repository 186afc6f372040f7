"""Cutting an adapted model into what the compiled step takes: trainable, settings, frozen. Plain dicts of arrays, by name."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.stack import AXES
from ..parallel.constraints import gathered, looked_up
from .inject import LABEL
from .labels import FROZEN
from .modules import AdapterSetting
from .sites import logical_name
from .spec import MemberSpec, Structure

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model in parts.

    Attributes:
        graphdef: its structure while training.
        eval_graphdef: its structure while evaluating (no dropout).
        paths: name -> where the variable stands; the names are dotted and say layers only where they are not stacked.
        labels: name of a trainable array -> its label.
        axes: name -> the array's logical axes, of those that have names for them.
        trainable: float32 arrays that are differentiated.
        settings: a member's untrained numbers (scales, dropout).
        frozen: everything else: the base.
    """

    graphdef: nnx.GraphDef[Any]
    eval_graphdef: nnx.GraphDef[Any]
    paths: dict[str, tuple[Any, ...]]
    labels: dict[str, str]
    axes: dict[str, tuple[str | None, ...]]
    trainable: Arrays
    settings: Arrays
    frozen: Arrays

    def merge(self, trainable: Arrays, settings: Arrays, frozen: Arrays, *, training: bool) -> nnx.Module:
        """The model with these arrays, on a mesh gathered as far as nobody else will: a stack gathers its layers one at a time."""
        parts = (trainable, settings, frozen)
        flat = [(self.paths[name], self._at_hand(name, value)) for part in parts for name, value in part.items()]
        return nnx.merge(self.graphdef if training else self.eval_graphdef, nnx.from_flat_state(flat))

    def _at_hand(self, name: str, array: jax.Array) -> jax.Array:
        axes = self.axes.get(name)
        return array if axes is None or axes[0] == "layers" or looked_up(axes) else gathered(array, axes)


def partition(model: nnx.Module) -> Partition:
    """Cuts an adapted model (`inject`) by its labels.

    Raises:
        ValueError: nothing is trainable, as in a model without adapters.
    """
    graphdef, state = nnx.split(model, graph=True)
    eval_graphdef = nnx.graphdef(nnx.view(model, raise_if_not_found=False, deterministic=True, use_running_average=True))
    parts: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    paths, labels, axes = {}, {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = logical_name(path)
        if name in paths:
            raise ValueError(f"two parameters are called '{name}'")
        paths[name] = path
        if len(named := variable.get_metadata().get(AXES, ())) == variable.ndim > 0:
            axes[name] = tuple(named)
        label = variable.get_metadata().get(LABEL, FROZEN)
        if isinstance(variable, AdapterSetting):
            parts[1][name] = variable.get_value()
        elif label != FROZEN:
            parts[0][name] = jnp.asarray(variable[...], jnp.float32)  # of a bfloat16 base too: small updates would round away
            labels[name] = label
        else:
            parts[2][name] = variable.get_value()
    if not labels:
        raise ValueError("nothing is trainable: inject adapters first")
    return Partition(graphdef, eval_graphdef, paths, labels, axes, *parts)


def with_dropout_keys(settings: Arrays, key: jax.Array) -> Arrays:
    """The settings with this step's dropout keys: one for each site and layer, whatever the structure around them.

    Args:
        key: the member's key for this step.
    """
    out = dict(settings)
    for name, keys in settings.items():
        if not name.endswith(".dropout_key"):
            continue
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if keys.ndim == 0:
            out[name] = own
        else:
            # Counted from the top layer down: a member's top layer is the same in every structure, its lowest is not.
            out[name] = jax.vmap(lambda i, own=own: jax.random.fold_in(own, i))(jnp.arange(keys.shape[0])[::-1])
    return out


def update_mask(part: Partition, spec: MemberSpec, structure: Structure) -> Arrays | None:
    """Which layers of a trained base weight a member trains: 1 or 0 for each layer, shaped to multiply the gradient.

    `bias: lora_only` trains the biases of adapted layers alone, but a stacked bias holds those of all layers. None where nothing
    needs a mask. Factors never do: their padding stays zero by itself.
    """
    if structure.bias != "lora_only":
        return None
    masks: dict[str, jax.Array] = {}
    for shape in structure.sites:
        name = f"{shape.site.name}.bias"
        if shape.site.biased:
            member = spec.sites.get(shape.site.name)
            on = np.zeros(len(shape.site.names)) if member is None else (member.ranks > 0).astype(np.float32)
            array = part.trainable[name]
            masks[name] = jnp.asarray(on, jnp.float32).reshape(-1, *([1] * (array.ndim - 1))) if shape.site.depth else jnp.float32(on[0])
    return masks
