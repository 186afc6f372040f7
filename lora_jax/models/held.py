"""Weights that a checkpoint holds quantised stay so in memory: which of a model's layers they are, and what is read for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..errors import InputError, warn
from ..weights.checkpoint import Checkpoint, all_finite
from ..weights.quantized import Mixed, QuantFormat
from .experts import ExpertLinear
from .families.base import Weight
from .layers import Embedding
from .quantized import TABLES, quantized
from .stored import put

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class HeldWeight:
    """A weight that is read as the checkpoint has it.

    Attributes:
        form: of each matrix; `Mixed` where the layers' differ.
        weight: its tensors.
        shape: of the parameter it stands for.
        checkpoint: that holds them.
    """

    form: QuantFormat
    weight: Weight
    shape: tuple[int, ...]
    checkpoint: Checkpoint

    def shapes(self, outputs: int, inputs: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays, layers and experts in front, as shapes."""
        lead = self.shape[: self.weight.leading]
        if isinstance(self.form, Mixed):
            return self.form.stacked_shapes(outputs, inputs, lead[0])
        return {name: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype) for name, s in self.form.shapes(outputs, inputs).items()}

    def read(self) -> dict[str, np.ndarray]:
        """The arrays.

        Raises:
            InputError: a scale is no finite number.
        """
        matrices: dict[tuple[int, ...], list[dict[str, np.ndarray]]] = {}
        for at, _, name in self.weight.tensors(self.shape):
            arrays = self.checkpoint.read_held(name)
            if not all(all_finite(array) for array in arrays.values()):
                raise InputError(f"{self.checkpoint.file(name)}: '{name}' has scales that are NaN or infinite: the file is damaged.")
            matrices.setdefault(at, []).append(arrays)
        joined = {at: {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]} for at, pieces in matrices.items()}
        lead = self.shape[: self.weight.leading]
        if isinstance(self.form, Mixed):
            return self.form.stack([joined[at] for at in np.ndindex(*lead)])
        found = {name: np.empty((*lead, *array.shape), array.dtype) for name, array in next(iter(joined.values())).items()}
        for at, arrays in joined.items():
            for name, array in arrays.items():
                found[name][at] = array
        return found


def hold(base: nnx.Module, table: Mapping[str, Weight], prefix: str, checkpoint: Checkpoint, where: str) -> dict[Path, HeldWeight]:
    """Puts quantised layers in the place of those whose weights a checkpoint holds quantised, in place; their arrays are shapes.

    Args:
        base: of shapes.
        table: parameter path -> its tensors.
        prefix: of the base's paths in `table`.
        checkpoint: the checkpoint.
        where: for messages.

    Returns:
        path of a module in the base -> its weight.

    Raises:
        InputError: the checkpoint holds no weight so.
    """
    found: dict[Path, HeldWeight] = {}
    left: dict[str, str] = {}
    for path, module in list(nnx.iter_modules(base)):
        linear = type(module) in (nnx.Linear, ExpertLinear)
        if not linear and not (type(module) is Embedding and path[-1] in TABLES):
            continue
        kind = "kernel" if linear else "embedding"
        name = ".".join(map(str, path)).replace("layers.segments.0.block.", "layers.")
        weight, shape = table[f"{prefix}{name}.{kind}"], tuple(getattr(module, kind).shape)
        names = [one for _, _, one in weight.tensors(shape)]
        stored = [checkpoint.quantised(one) for one in names]
        if not any(stored):
            continue
        outputs, inputs = (shape[-1], shape[-2]) if linear else (shape[-2], shape[-1])
        form = _common(weight, [checkpoint.held(one, transposed=linear and not weight.transpose) for one in names], outputs)
        if form is None:
            left[name] = " and ".join(dict.fromkeys(one or "not quantised" for one in stored))
            continue
        found[path] = HeldWeight(form, weight, shape, checkpoint)
        put(base, path, quantized(module, form, found[path].shapes(outputs, inputs)))
    if not found:
        why = f", but no weight is stored in a form that can be kept ({_shown(left)})" if left else ", but no weight is stored quantised"
        raise InputError(f"{where}: model.quantized: keep{why}. Leave the key out, or quantise with model.transforms.")
    if left:
        warn(f"{where}: model.quantized: keep, but {len(left)} kinds of weights cannot be kept and are dequantised: {_shown(left)}.")
    return found


def _shown(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name} is {stored}" for name, stored in list(left.items())[:4]) + ("; ..." if len(left) > 4 else "")


def _common(weight: Weight, forms: Sequence[QuantFormat | None], outputs: int) -> QuantFormat | None:
    """The format of a weight whose tensors, in their order, have these; None where it has none."""
    known, pieces = [form for form in forms if form is not None], 1 + len(weight.joined)
    if len(known) < len(forms) or (pieces > 1 and not all(form.joins(outputs // pieces) for form in known)):
        return None
    kinds = list(dict.fromkeys(known))
    if len(kinds) == 1:
        return kinds[0]
    by_layer = [known[i : i + pieces] for i in range(0, len(known), pieces)]
    if weight.leading != 1 or any(len(set(layer)) > 1 for layer in by_layer):
        return None
    return Mixed(tuple(kinds), tuple(kinds.index(layer[0]) for layer in by_layer))
