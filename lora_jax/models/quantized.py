"""Layers whose weight is held quantised, in the place of linear layers and embeddings.

A weight is made of its codes where it is used, a layer at a time, and made again for the backward pass: what a layer keeps between the two
are its codes, which lie in the base already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..parallel.constraints import by_rows, gathered, rows_shared
from ..parallel.mesh import parameter_sharding, place, to_host
from ..weights.quantized import QuantFormat
from .experts import ExpertLinear, grouped_matmul
from .layers import AXES, OF_ALL_LAYERS, Array
from .stored import StoredEmbedding, StoredLinear

# Metadata key of the arrays of a quantised weight: they are no numbers to train.
QUANTIZED = "quantized"
# The tables of tokens, which a base may hold quantised.
TABLES = ("embed", "source_embed")
# Weights of a vocabulary's matrix that are dequantised at once at the most (8 MiB in float32): such a matrix is larger than a layer.
SLICE = 2 * 1024 * 1024


class Held:
    """The arrays of a quantised weight, as parameters of the module that this is mixed into.

    Attributes:
        form: which arrays they are, and what they stand for.
        sizes: of the weight: (outputs, inputs), an embedding's rows being outputs.
        inputs_first: whether the module's weight has its inputs before its outputs, unlike the format's matrix.
        axes: logical ones of the module's weight; None where they have no names.
        dtype: of the matmuls, and of the weight where it is asked for.
    """

    form: QuantFormat
    sizes: tuple[int, int]
    axes: tuple[str | None, ...] | None
    dtype: Any
    inputs_first: ClassVar[bool] = True

    def hold(
        self, form: QuantFormat, arrays: Mapping[str, Any], sizes: tuple[int, int], axes: tuple[str | None, ...] | None, dtype: Any
    ) -> None:
        """Makes the parameters of arrays or shapes, layers and experts in front of each."""
        self.form, self.sizes, self.axes, self.dtype = nnx.static(form), nnx.static(sizes), nnx.static(axes), dtype
        self.names: tuple[str, ...] = nnx.static(tuple(arrays))
        for name, array in arrays.items():
            variable = nnx.Param(array)
            variable.set_metadata(QUANTIZED, True)
            if name in form.whole:
                variable.set_metadata(OF_ALL_LAYERS, True)
            if axes is not None:
                variable.set_metadata(AXES, self.axes_of(name))
            setattr(self, name, variable)

    def axes_of(self, name: str) -> tuple[str | None, ...]:
        """The logical axes of one of the arrays: those of the weight that they run along."""
        assert self.axes is not None
        first, second = self.axes[-2:]
        lead = () if name in self.form.whole else self.axes[:-2]
        along = {"in": first, "out": second} if self.inputs_first else {"out": first, "in": second}
        return (*lead, *(along.get(axis or "", axis) for axis in self.form.axes[name]))

    def arrays(self) -> dict[str, Array]:
        """The arrays, by the format's names."""
        return {name: getattr(self, name)[...] for name in self.names}

    def at_hand(self) -> dict[str, Array]:
        """The arrays of one matrix, where a layer is run: those that hold the whole stack are cut down to it, and gathered on a mesh."""
        arrays, own = self.arrays(), {}
        for name, array in self.form.picked(arrays).items():
            of_stack = self.axes is not None and array.ndim < arrays[name].ndim
            own[name] = gathered(array, self.axes_of(name)[1:]) if of_stack else array
        return own

    @property
    def lead(self) -> tuple[int, ...]:
        """How many layers and experts there are, as far as the weight has such axes."""
        name = next(name for name in self.names if name not in self.form.whole)
        shape = getattr(self, name).shape
        return tuple(shape[: len(shape) - len(self.form.axes[name])])

    @property
    def slices(self) -> int:
        """In how many parts the matrix is dequantised to be multiplied by: several of a vocabulary's, unless devices share its rows."""
        of_vocabulary = self.axes is not None and self.axes[-1 if self.inputs_first else -2] == "vocab"
        if not of_vocabulary or rows_shared():
            return 1
        outputs = self.sizes[0]
        least = -(-math.prod(self.sizes) // SLICE)
        # Equal parts, where there are such.
        return next((count for count in range(least, min(2 * least, outputs)) if outputs % count == 0), least)

    def matrix(self, layer: int | None = None) -> Array:
        """(..., outputs, inputs) of the module's dtype: of one layer, or of all."""
        arrays, lead = self.arrays(), len(self.lead)
        if layer is not None:
            arrays, lead = {n: a if n in self.form.whole else a[layer] for n, a in arrays.items()}, lead - 1
        return _matrix(self.form, lead, jnp.dtype(self.dtype or jnp.float32), arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _matrix(form: QuantFormat, lead: int, dtype: Any, arrays: dict[str, Array]) -> Array:
    def decode(arrays: Mapping[str, Array]) -> Array:
        return form.decode(form.picked(arrays))

    for _ in range(lead):
        decode = jax.vmap(decode, in_axes=({name: None if name in form.whole else 0 for name in arrays},))
    return decode(arrays).astype(dtype)


class QuantizedLinear(Held, StoredLinear):
    """A linear layer with a quantised weight.

    Args:
        form, arrays, axes, dtype: see `Held`.
        inputs, outputs: of the weight.
        bias: of the layer it stands for, or None.
    """

    def __init__(
        self,
        form: QuantFormat,
        arrays: Mapping[str, Any],
        inputs: int,
        outputs: int,
        *,
        bias: nnx.Param | None,
        axes: tuple[str | None, ...] | None,
        dtype: Any,
    ):
        self.hold(form, arrays, (outputs, inputs), axes, dtype)
        self.bias = bias

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """(..., inputs) -> (..., outputs)."""
        y: Array = _product(self.form, self.slices, x.astype(self.dtype or x.dtype), self.at_hand())
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(..., inputs, outputs)."""
        return (*self.lead, *self.sizes[::-1])

    @property
    def kernel_axes(self) -> tuple[str | None, ...] | None:
        """The weight's logical axes."""
        return self.axes

    def dense_kernel(self, layer: int | None = None) -> Array:
        """The dequantised weight, (..., inputs, outputs)."""
        return self.matrix(layer).swapaxes(-1, -2)


class QuantizedExperts(QuantizedLinear):
    """A linear layer for each expert of a mixture, with quantised weights; see `ExpertLinear`."""

    def __init__(self, form: QuantFormat, arrays: Mapping[str, Any], linear: ExpertLinear):
        shape = linear.kernel.shape
        super().__init__(form, arrays, *shape[-2:], bias=None, axes=linear.kernel.get_metadata().get(AXES), dtype=linear.dtype)
        self.used = linear.used

    def as_linear(self) -> Any:
        """The layer as an `ExpertLinear`, which holds the weights as one array."""
        made = ExpertLinear(1, self.used, 1, 1, ("", ""), dtype=self.dtype, rngs=nnx.Rngs(0))
        made.kernel = self.kernel
        return made

    def __call__(self, x: Array, expert: Array) -> Array:
        """(tokens * used, inputs) -> (tokens * used, outputs), row i by expert `expert[i]`."""
        return _grouped(self.form, x.astype(self.dtype), self.arrays(), expert)


class QuantizedEmbedding(Held, StoredEmbedding):
    """An embedding with a quantised table; rows are dequantised as they are looked up.

    Args:
        form, arrays, axes, dtype: see `Held`.
        rows, width: of the table.
    """

    inputs_first = False

    def __init__(
        self, form: QuantFormat, arrays: Mapping[str, Any], rows: int, width: int, *, axes: tuple[str | None, ...] | None, dtype: Any
    ):
        self.hold(form, arrays, (rows, width), axes, dtype)

    def __call__(self, tokens: Array) -> Array:
        """(rows, length) int32 -> (rows, length, width)."""
        found = self.form.decode(self.form.take(self.arrays(), tokens.reshape(-1)))
        return by_rows(found.reshape(*tokens.shape, self.sizes[1]).astype(self.dtype))

    def attend(self, query: Array) -> Array:
        """(..., width) -> (..., rows): the product with every row."""
        return self.projection()(query.astype(self.dtype))

    def projection(self) -> Callable[[Array], Array]:
        """`attend` with its codes at hand."""
        arrays = {name: gathered(array, self.axes and self.axes_of(name)) for name, array in self.arrays().items()}
        return lambda hidden: _product(self.form, self.slices, hidden, arrays)

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """(rows, width)."""
        return self.sizes

    @property
    def embedding_axes(self) -> tuple[str | None, ...] | None:
        """The table's logical axes."""
        return self.axes

    def dense_embedding(self) -> Array:
        """The dequantised table, (rows, width)."""
        return self.matrix()


def _weight(form: QuantFormat, arrays: Mapping[str, Array], dtype: Any) -> Array:
    return form.decode(arrays).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(form: QuantFormat, slices: int, x: Array, arrays: dict[str, Array]) -> Array:
    """x (..., inputs) times the matrix that the arrays stand for, of which `slices` parts are made one after another: (..., outputs)."""

    def part(weight: Array) -> Array:
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))

    if slices == 1:
        return part(_weight(form, arrays, x.dtype))

    def put_in(y: Array, first: Array | int, weight: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(y, part(weight), first, y.ndim - 1)

    return _by_slices(form, slices, arrays, x.dtype, jnp.zeros((*x.shape[:-1], _outputs(form, arrays)), x.dtype), put_in)


def _product_forward(form: QuantFormat, slices: int, x: Array, arrays: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    return _product(form, slices, x, arrays), arrays


def _product_backward(form: QuantFormat, slices: int, arrays: dict[str, Array], dy: Array) -> tuple[Array, None]:
    if slices == 1:
        return jnp.matmul(dy, _weight(form, arrays, dy.dtype)), None

    def add(dx: Array, first: Array | int, weight: Array) -> Array:
        return dx + jnp.matmul(jax.lax.dynamic_slice_in_dim(dy, first, len(weight), dy.ndim - 1), weight)

    inputs = jax.eval_shape(form.decode, arrays).shape[1]
    return _by_slices(form, slices, arrays, dy.dtype, jnp.zeros((*dy.shape[:-1], inputs), dy.dtype), add), None


def _outputs(form: QuantFormat, arrays: Mapping[str, Array]) -> int:
    return jax.eval_shape(form.decode, arrays).shape[0]


def _by_slices(
    form: QuantFormat,
    slices: int,
    arrays: dict[str, Array],
    dtype: Any,
    start: Array,
    step: Callable[[Array, Array | int, Array], Array],
) -> Array:
    """What `step` makes of `start` and each part of the rows of a matrix in turn, which it is given with the number of its first row."""
    outputs = _outputs(form, arrays)
    count = -(-outputs // slices)
    whole = outputs // count

    def one(i: Array | int, found: Array, rows: int = count) -> Array:
        return step(found, i * count, _weight(form, form.rows(arrays, i * count, rows), dtype))

    found = jax.lax.fori_loop(0, whole, one, start)
    return found if outputs == whole * count else one(whole, found, outputs - whole * count)


_product.defvjp(_product_forward, _product_backward)


def _experts(form: QuantFormat, arrays: dict[str, Array], dtype: Any) -> Array:
    """(experts, inputs, outputs)."""
    return jax.vmap(form.decode)(arrays).astype(dtype).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(form: QuantFormat, x: Array, arrays: dict[str, Array], expert: Array) -> Array:
    return grouped_matmul(x, _experts(form, arrays, x.dtype), expert)


def _grouped_forward(form: QuantFormat, x: Array, arrays: dict[str, Array], expert: Array) -> tuple[Array, Any]:
    return _grouped(form, x, arrays, expert), (arrays, expert)


def _grouped_backward(form: QuantFormat, kept: Any, dy: Array) -> tuple[Array, None, None]:
    arrays, expert = kept
    return grouped_matmul(dy, _experts(form, arrays, dy.dtype).swapaxes(1, 2), expert), None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def encoded(form: QuantFormat, variable: nnx.Variable, *, transposed: bool) -> dict[str, Any]:
    """The arrays of a module's weight, matrix after matrix; shapes where it is one itself.

    Each is encoded by itself on one device, so that the bits do not depend on how the weight is cut up over a mesh.

    Args:
        form: the format.
        variable: (..., inputs, outputs), or with `transposed` false (rows, width).
        transposed: whether the format's matrix has its axes the other way round.
    """
    *lead, first, second = variable.shape
    outputs, inputs = (second, first) if transposed else (first, second)
    shapes = form.shapes(outputs, inputs)
    whole = variable.get_value()
    if isinstance(whole, jax.ShapeDtypeStruct):
        return {name: jax.ShapeDtypeStruct((*lead, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    filled = {name: np.empty((*lead, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    for at in np.ndindex(*lead):
        matrix = to_host(whole[at]).astype(np.float32)
        for name, array in _encoded(form, matrix.T if transposed else matrix).items():
            filled[name][at] = to_host(array)
    return filled


@functools.partial(jax.jit, static_argnums=(0,))
def _encoded(form: QuantFormat, matrix: Array) -> dict[str, Array]:
    return form.encode(matrix)


def quantized(module: Any, form: QuantFormat, arrays: Mapping[str, Any] | None = None, *, mesh: Any = None) -> nnx.Module:
    """The module with its weight in a format: what stands for an `nnx.Linear`, an `ExpertLinear` or an `Embedding`.

    Args:
        module: as it is; its bias is shared.
        form: the format.
        arrays: of its weight; by default those nearest to it.
        mesh: where they are put, by the weight's axes: what follows a block may lie whole where its count is not divided.
    """
    embedding = not isinstance(module, nnx.Linear | ExpertLinear)
    variable = module.embedding if embedding else module.kernel
    axes, shape = variable.get_metadata().get(AXES), variable.shape
    arrays = encoded(form, variable, transposed=not embedding) if arrays is None else arrays
    made: Any
    if embedding:
        made = QuantizedEmbedding(form, arrays, *shape, axes=axes, dtype=module.dtype)
    elif isinstance(module, ExpertLinear):
        made = QuantizedExperts(form, arrays, module)
    else:
        made = QuantizedLinear(form, arrays, *shape[-2:], bias=module.bias, axes=axes, dtype=module.dtype)
    for name in made.names:
        variable = getattr(made, name)
        if not isinstance(variable.get_value(), jax.ShapeDtypeStruct):
            own = variable.get_metadata().get(AXES)
            value = variable.get_value()
            put = jnp.asarray(value) if mesh is None or own is None else place(value, parameter_sharding(mesh, value.shape, own))
            variable.set_value(put)
    return made


def held_bytes(model: nnx.Module) -> int:
    """Bytes of all parameters of a model, arrays or shapes."""
    return sum(math.prod(v.shape) * v.dtype.itemsize for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param))
