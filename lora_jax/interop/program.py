"""A model as a function of its weights and its inputs alone, for programs that leave this library: nothing of it is known there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from ..adapters.merge import merged_base
from ..errors import InputError
from ..models.convolution import DepthwiseConv
from ..models.detector import Detector
from ..models.encoder import Encoder
from ..models.encoder_decoder import Base, EncoderDecoder
from ..models.heads import Classifier
from ..models.policy import Policy
from ..models.stack import stacks_of
from ..models.vision import VisionBase


@dataclasses.dataclass(frozen=True)
class ProgramArray:
    """An input or output.

    Attributes:
        name: as transformers calls it.
        dims: its axes; a name is of any length, the same wherever it stands.
        dtype: NumPy's name of it.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {"name": self.name, "dims": list(self.dims), "dtype": self.dtype}


@dataclasses.dataclass(frozen=True)
class Program:
    """A merged model.

    Attributes:
        inputs: its arguments after the weights.
        output: what it returns.
        weights: name -> array, float32.
        call: (weights, one array an input) -> the output.
    """

    inputs: tuple[ProgramArray, ...]
    output: ProgramArray
    weights: Mapping[str, jax.Array]
    call: Callable[..., jax.Array]

    def specs(self) -> list[jax.ShapeDtypeStruct]:
        """The inputs, their named axes as symbols of one scope."""
        scope = export.SymbolicScope()
        names = {dim for one in self.inputs for dim in one.dims if isinstance(dim, str)}
        symbols = {name: export.symbolic_shape(name, scope=scope)[0] for name in sorted(names)}
        return [
            jax.ShapeDtypeStruct(tuple(symbols[dim] if isinstance(dim, str) else dim for dim in one.dims), np.dtype(one.dtype))
            for one in self.inputs
        ]


def plain_model(model: nnx.Module) -> Base | Classifier:
    """The base, or the classifier, that a task's model holds; adapted or not.

    Raises:
        InputError: it is none that such a program can be made of.
    """
    found = model if isinstance(model, Base | Classifier) else getattr(model, "base", None)
    if not isinstance(found, Base | Classifier):
        raise InputError(f"a {type(model).__name__} is no model of texts or images.")
    if isinstance(found, Detector):
        raise InputError("it is a detector, and programs are written of models with one output.")
    base = found.base if isinstance(found, Classifier) else found
    if isinstance(base, EncoderDecoder | Policy):
        what = "an encoder-decoder, whose answers are generated token by token" if isinstance(base, EncoderDecoder) else "a policy"
        raise InputError(f"it is {what}, and programs are written of encoders, decoders, classifiers and models of images.")
    if isinstance(base, Encoder) and base.config.block.relative is not None:
        raise InputError("its attention looks positions up in tables of one length, and such a program takes any length.")
    return found


def program_of(model: nnx.Module, *, unrolled: bool = False) -> Program:
    """A model as a program; an adapter is merged.

    Args:
        model: a base, or what a task makes of one.
        unrolled: whether its layers stand one after the other in place of a loop, and convolutions whole in place of sums.

    Raises:
        InputError: there is no such program of it.
    """
    merged = plain_model(merged_base(model))
    base: Any = merged.base if isinstance(merged, Classifier) else merged
    for stack in stacks_of(base) if unrolled else ():
        stack.scan = False
    for _, module in nnx.iter_modules(merged) if unrolled else ():
        if isinstance(module, DepthwiseConv):
            module.shifts = False
    inputs = _inputs(base)
    output = _output(merged, base)
    graphdef, state = nnx.split(merged)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    weights = {name: jnp.asarray(variable.get_value()) for name, (_, variable) in variables.items()}

    def call(weights: Mapping[str, jax.Array], *arrays: jax.Array) -> jax.Array:
        filled = nnx.from_flat_state([(path, variable.replace(weights[name])) for name, (path, variable) in variables.items()])
        whole: Any = nnx.merge(graphdef, filled)
        run = whole.hidden if isinstance(whole, Encoder) else whole
        return run(**dict(zip((_ARGUMENTS[one.name] for one in inputs), arrays, strict=True))).astype(jnp.float32)

    return Program(inputs, output, weights, call)


# transformers' word for an input -> ours.
_ARGUMENTS = {"input_ids": "tokens", "attention_mask": "attention_mask", "token_type_ids": "token_types", "pixels": "pixels"}
_TEXT = ("batch", "length")


def _inputs(base: Any) -> tuple[ProgramArray, ...]:
    if isinstance(base, VisionBase):
        return (ProgramArray("pixels", ("batch", *base.pixels.size, base.pixels.channels), "float32"),)
    names = ["input_ids", "attention_mask"]
    if isinstance(base, Encoder) and base.config.token_types > 1:
        names.append("token_type_ids")
    return tuple(ProgramArray(name, _TEXT, "int32") for name in names)


def _output(model: Base | Classifier, base: Any) -> ProgramArray:
    if isinstance(base, VisionBase):
        pixels = jax.ShapeDtypeStruct((1, *base.pixels.size, base.pixels.channels), jnp.float32)
        shape = nnx.eval_shape(lambda model, pixels: model(pixels), model, pixels).shape
        return ProgramArray("logits" if isinstance(model, Classifier) else "last_hidden_state", ("batch", *shape[1:]), "float32")
    if isinstance(model, Classifier):
        classes = model.classifier.kernel.shape[-1]
        return ProgramArray("logits", (*(_TEXT if model.shape.reads == "each" else _TEXT[:1]), classes), "float32")
    if base.is_decoder:
        return ProgramArray("logits", (*_TEXT, base.config.vocab), "float32")
    return ProgramArray("last_hidden_state", (*_TEXT, base.config.block.width), "float32")


def program_reason(model: nnx.Module) -> str | None:
    """Why no program can be made of a model; None where one can."""
    try:
        plain_model(model)
    except InputError as error:
        return str(error)
    return None


def array_lines(arrays: Sequence[ProgramArray]) -> list[str]:
    """A line of a card for each input or output.

    >>> array_lines([ProgramArray("input_ids", ("batch", "length"), "int32")])
    ['input_ids: int32 (batch, length)']
    """
    return [f"{one.name}: {one.dtype} ({', '.join(map(str, one.dims))})" for one in arrays]
