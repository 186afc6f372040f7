"""The arrays of a method at a site (`Parameter`), the variables that hold them, and what their init may read."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

T = TypeVar("T")

# Metadata keys of a site's variables: their `Parameter`, and the name it has among the method's.
PARAMETER, PARAMETER_NAME = "parameter", "parameter_name"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of a method at a site.

    Attributes:
        shape: of one layer; at an expert site an array of each expert's has the experts in front.
        label: its optimizer group. The optimizer knows `adapter_a` and `adapter_b` (LoRA+'s learning rate ratio); any other label trains
            at the plain learning rate.
        axes: for each axis, which axis of the site's weight it lies along on a mesh: `in`, `out` or `experts`; None: it is replicated.
        fill: value of the padding, and of a layer that the member does not adapt. With it, and settings of 0, the site computes what the
            base does.
        trained: False for an array that a member draws and keeps; it is one of the settings then.
        decays: whether weight decay pulls on it: not where the identity is another number than 0.
        scope: `layer`, one array for each layer of a site; or `adapter`, one array for all sites, without layers in front. Of the latter
            each site says the shape it needs, and the array has the largest of them (`Method.init_shared`).
    """

    shape: tuple[int, ...]
    label: str = "adapter"
    axes: tuple[str | None, ...] = ()
    fill: float = 0.0
    trained: bool = True
    decays: bool = True
    scope: Literal["layer", "adapter"] = "layer"

    @property
    def own(self) -> tuple[slice, ...]:
        """The part of a padded array (its last axes are those of `shape`) that is this parameter's."""
        return tuple(slice(n) for n in self.shape)


def largest(parameters: Sequence[Parameter]) -> Parameter:
    """The parameter whose shape holds all of these, which differ in their shapes alone."""
    return dataclasses.replace(parameters[0], shape=tuple(max(sizes) for sizes in zip(*(p.shape for p in parameters), strict=True)))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one layer of a site saw of the data before step 0, over `adapter.init_batches` batches (`training/statistics.py`).

    Attributes:
        moment: (inputs, inputs) float64, the sum over tokens of `x x^T`; None where nobody asked for it.
        gradient: (inputs, outputs) float64, of the loss with respect to the weight; None likewise.
        tokens: how many there were.
        squares: (inputs,) float64, the sum over tokens of `x^2`; None likewise.
    """

    moment: np.ndarray | None = None
    gradient: np.ndarray | None = None
    tokens: int = 0
    squares: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class SiteData:
    """What an init may read of one layer of a site.

    Attributes:
        weight: gives the layer's weight, (inputs, outputs) with the experts in front, float32.
        statistics: what the layer saw of the data; empty where the method asked for none (`Method.wants`).
        settings: the method's numbers of the layer, by `Method.setting_names`.
        largest: the largest rank that any member of the pack has at the site; at least the layer's own.
        memo: what `once` remembers.
    """

    weight: Callable[[], np.ndarray]
    statistics: Statistics = Statistics()
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    largest: int = 0
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made by the first of a pack's members that asks for it; of a layer, and the same for all members."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


class SiteArrays(types.SimpleNamespace):
    """A site's trained arrays and settings of one member, by the method's own names, as attributes.

    They are of all layers that the site has arrays for (layers in front where the weight is stacked), padding and all.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class AdapterParam(nnx.LoRAParam):
    """An array that an adapter trains: `nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)`, the idiom of Flax's docs, trains these.

    An `nnx.LoRAParam` is an `nnx.Param`: what means the base alone leaves it out (`is_base`).
    """


def is_base(variable: object) -> bool:
    """Whether a variable of a model is a parameter of its base: an `nnx.Param` that no adapter trains."""
    return isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam)


class AdapterSetting(nnx.Variable):
    """A number or array that belongs to a member but is not trained: scale, dropout rate. Traced data, never a constant."""


class DropoutKey(AdapterSetting):
    """The PRNG key of a site's dropout; the training step sets a new one each time."""


def shared_name(name: str) -> str:
    """What an array of scope `adapter` is called in an adapted model, whichever site comes first."""
    return f"adapter.{name}"


def own_name(variable: nnx.Variable) -> str | None:
    """The name that a variable has whatever its path: that of an array of scope `adapter`; None for every other."""
    metadata = variable.get_metadata()
    parameter = metadata.get(PARAMETER)
    return shared_name(metadata[PARAMETER_NAME]) if parameter is not None and parameter.scope == "adapter" else None


def variable_of(name: str, parameter: Parameter, lead: tuple[int, ...], metadata: Mapping[str, Any]) -> nnx.Variable:
    """The variable of a method's parameter, at its fill value, `lead` in front of its shape."""
    kind = AdapterParam if parameter.trained else AdapterSetting
    variable = kind(jnp.full((*lead, *parameter.shape), parameter.fill, jnp.float32), **metadata)
    variable.set_metadata(PARAMETER, parameter)
    variable.set_metadata(PARAMETER_NAME, name)
    return variable
