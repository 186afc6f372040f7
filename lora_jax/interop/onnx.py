"""`--format onnx`: the forward pass as an ONNX graph of any batch and length, which onnxruntime runs; made by jax2onnx.

jax2onnx knows JAX's primitives, but traces functions with its own NumPy in place of JAX's, which does not take our models with axes of
any length. So a model is traced here, and its primitives are handed over one by one (`primitives`), what follows from the weights alone
worked out.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.core import Tracer
from jax.extend.core import Literal

from ..config.doors import EXPORTERS
from ..errors import InputError, RunError
from ..sweeps.restore import Restored
from .card import model_card, write_card
from .export import Exporter, ExportOptions, Runtime
from .hf import write_reader
from .program import Program, array_lines, program_of, program_reason

NAME = "model.onnx"
NEEDS = ("jax2onnx", "onnx")
_LARGEST = 2**31 - 2**20  # bytes of a protocol buffer

# Calls of functions -> the parameter that holds the function: what is in them is handed over in their place.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def _stack(*arrays: jax.Array, axis: int) -> jax.Array:
    return jax.lax.concatenate([jax.lax.expand_dims(array, (axis,)) for array in arrays], axis)


def _pad(x: jax.Array, value: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> jax.Array:
    if any(min(low, high, between) < 0 or between for low, high, between in padding_config):
        return jax.lax.pad(x, value, padding_config)
    for axis, (low, high, _) in enumerate(padding_config):
        edges = [jax.lax.broadcast_in_dim(value, (*x.shape[:axis], size, *x.shape[axis + 1 :]), ()) for size in (low, high)]
        parts = [part for part, size in zip((edges[0], x, edges[1]), (low, 1, high), strict=True) if size]
        x = jax.lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x


# Primitives that jax2onnx does not know, or not with axes of any length, by those that it does.
_BY_OTHERS: dict[str, Callable[..., Any]] = {"stack": _stack, "pad": _pad}


def primitives(jaxpr: Any, consts: Sequence[Any], *arrays: Any) -> list[Any]:
    """Computes a jaxpr by its primitives; those whose inputs are all known are worked out at once.

    Args:
        jaxpr: of the function.
        consts: values of its constants.
        arrays: its arguments.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arrays, strict=True))
    for equation in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params[_CALLS[name]]
            found = primitives(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *values)
        else:
            bind: Any = _BY_OTHERS.get(name, equation.primitive.bind)
            sizes = [size for v in equation.outvars for size in v.aval.shape]
            if values and not any(isinstance(value, Tracer) for value in values) and not any(map(export.is_symbolic_dim, sizes)):
                with jax.ensure_compile_time_eval():
                    found = bind(*values, **params)
            else:
                found = bind(*values, **params)
            found = found if equation.primitive.multiple_results else [found]
        env |= dict(zip(equation.outvars, found, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def write_onnx(program: Program, path: Path) -> None:
    """Writes a program, its weights in it, as a graph whose whole-number inputs are int64, as tokenizers and other exporters have them.

    Args:
        program: with its layers one after the other (`program_of(model, unrolled=True)`).
        path: the file.

    Raises:
        InputError: it is too large for one file.
        RunError: jax2onnx cannot convert it.
    """
    import jax2onnx
    import onnx

    size = sum(array.nbytes for array in program.weights.values())
    if size > _LARGEST:
        raise InputError(f"its weights take {size / 1e9:.1f} GB, and an ONNX file holds 2 GB.")
    for name in ("jax2onnx", "onnx_ir"):  # they tell at length which packages were not found, and which shapes have no type
        logging.getLogger(name).setLevel(logging.CRITICAL)
    specs = program.specs()
    closed = jax.make_jaxpr(lambda *arrays: program.call(program.weights, *arrays))(*specs)
    consts = [np.asarray(value) for value in closed.consts]
    try:
        model: Any = jax2onnx.to_onnx(
            lambda *arrays: primitives(closed.jaxpr, consts, *arrays)[0],
            specs,
            model_name="model",
            return_mode="proto",
            input_names=[one.name for one in program.inputs],
            output_names=[program.output.name],
        )
    except Exception as error:  # of many kinds, its own among them
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"jax2onnx cannot convert this model: {first}") from error
    _take_int64(model)
    _name_axes(model, program)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def _take_int64(model: Any) -> None:
    """Makes whole-number inputs int64, and casts them to what they were."""
    from onnx import TensorProto, helper

    casts = []
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.INT32:
            value.type.tensor_type.elem_type = TensorProto.INT64
            inner = f"{value.name}_int32"
            for node in model.graph.node:
                for i, name in enumerate(node.input):
                    if name == value.name:
                        node.input[i] = inner
            casts.append(helper.make_node("Cast", [value.name], [inner], name=f"cast_{value.name}", to=TensorProto.INT32))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)


def _name_axes(model: Any, program: Program) -> None:
    """Names the axes of inputs and output as the program does."""
    for value, one in zip([*model.graph.input, *model.graph.output], [*program.inputs, program.output], strict=True):
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims, one.dims, strict=True):
            if isinstance(name, str):
                dim.dim_param = name
            else:
                dim.dim_value = name


class OnnxExporter(Exporter):
    """A graph for onnxruntime and whatever else reads ONNX."""

    summary = "The forward pass as an ONNX graph of any batch and length, for onnxruntime."
    runtime = Runtime(NAME, "run_onnxruntime.py", "onnxruntime")

    def can(self, restored: Restored) -> str | None:
        """Why there is no such graph, or what has to be installed for it; None where there is."""
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            return f"it needs the package {missing[0]}: pip install 'lora-jax[onnx]'."
        return program_reason(restored.model)

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """`model.onnx`, tokenizer and a card."""
        program = program_of(restored.model, unrolled=True)
        write_onnx(program, folder / NAME)
        write_reader(folder, restored.member.config.model.source)
        inputs = ", ".join(f'"{one.name}": {one.name}' for one in program.inputs)
        usage = [
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("PATH/{NAME}")',
            f'{program.output.name} = session.run(["{program.output.name}"], {{{inputs}}})[0]',
            "",
            *(f"# {line}".replace("int32", "int64") for line in array_lines([*program.inputs, program.output])),
        ]
        summary = "`{base}` with a trained adapter merged into its weights, as an ONNX graph."
        write_card(folder, model_card(restored, library="onnx", relation="finetune", summary=summary, usage=usage))


EXPORTERS.register("onnx", OnnxExporter())
