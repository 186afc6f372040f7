"""An `nnx.LinearGeneral` as methods know sites: one axis of inputs and one of outputs."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..sites import SiteModule


class FlatSite:
    """The site of an `nnx.LinearGeneral` as methods know sites: one axis of inputs and one of outputs, both of them last.

    Args:
        site: all but its base is reached as it is.
        x: its input; any axes may be the contracted ones.

    Attributes:
        x: (..., inputs).
        base: takes (..., inputs), gives (..., outputs); its `kernel` is (inputs, outputs), its `bias` (outputs,) or None.
    """

    def __init__(self, site: SiteModule, x: jax.Array):
        self._site = site
        base: nnx.LinearGeneral = site.base
        contracted = sorted(axis % x.ndim for axis in base.axis)  # as Flax takes them, whatever the order they were given in
        kept = [axis for axis in range(x.ndim) if axis not in contracted]
        self._lead, self._out = tuple(x.shape[axis] for axis in kept), tuple(base.out_features)
        self.x = x.transpose(*kept, *contracted).reshape(*self._lead, -1)
        self.base = _FlatBase(base, self._lead, np.argsort([*kept, *contracted]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def unfold(self, y: jax.Array) -> jax.Array:
        """(..., outputs) as the base gives it."""
        return y.reshape(*self._lead, *self._out)


class _FlatBase:
    def __init__(self, base: nnx.LinearGeneral, lead: tuple[int, ...], order: np.ndarray):
        self._base, self._lead, self._order = base, lead, order

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._base(x.reshape(*self._lead, *self._base.in_features).transpose(*self._order))
        return y.reshape(*self._lead, -1)

    @property
    def kernel(self) -> jax.Array:
        return self._base.kernel[...].reshape(math.prod(self._base.in_features), -1)

    @property
    def bias(self) -> jax.Array | None:
        return None if self._base.bias is None else self._base.bias[...].reshape(-1)


def refuse_alpha(config: AdapterConfig) -> None:
    """For a method whose change of the weight has no scale.

    Raises:
        InputError: the section gives one.
    """
    for key in ("alpha", "alpha_pattern"):
        if getattr(config, key) != AdapterConfig.model_fields[key].get_default(call_default_factory=True):
            raise InputError(f"adapter.{key}: '{config.method}' has no scale that it could set.")
