"""An adapter's factors apart from any model: what is stacked, padded and combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..parallel.mesh import to_host
from .layout import SiteShape, hold
from .partition import Partition
from .sites import Site


@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter at one site, float32 on the host.

    Attributes:
        a, b: (layers, inputs, rank) and (layers, rank, outputs) of the site's topmost layers; one layer where it is a single weight.
            At an expert site (layers, experts, inputs, rank) and (layers, experts, rank, outputs).
        scale: (layers,).
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """(layers,) columns of A and rows of B that are not padding; 0 where the scale is."""
        used = np.abs(self.a).sum(-2) + np.abs(self.b).sum(-1) > 0
        used = used if used.ndim == 2 else used.any(1)
        return used.sum(-1) * (self.scale != 0)

    def fitted(self, shape: SiteShape) -> Factors:
        """The same with zeros for the layers and ranks that the shape has besides."""
        layers, rank = (shape.layers or 1) - len(self.scale), shape.rank - self.a.shape[-1]
        a = np.pad(self.a, [(layers, 0), *[(0, 0)] * (self.a.ndim - 2), (0, rank)])
        b = np.pad(self.b, [(layers, 0), *[(0, 0)] * (self.b.ndim - 3), (0, rank), (0, 0)])
        return Factors(a, b, np.pad(self.scale, (layers, 0)))


def is_factor(name: str) -> bool:
    """Whether a parameter is one of a site's two factors."""
    return name.endswith((".lora_a", ".lora_b"))


def factors_of(part: Partition) -> dict[str, Factors]:
    """Site name -> factors, of an adapted model in parts."""
    found = {}
    for name in part.settings:
        site, _, setting = name.rpartition(".")
        if setting == "scale":
            arrays = (to_host(a) for a in (part.trainable[f"{site}.lora_a"], part.trainable[f"{site}.lora_b"], part.settings[name]))
            a, b, scale = arrays
            found[site] = Factors(a, b, scale) if scale.ndim else Factors(a[None], b[None], scale[None])
    return found


def shapes_of(sites: list[Site], adapters: Sequence[dict[str, Factors]]) -> tuple[SiteShape, ...]:
    """The shapes that hold all of the adapters."""
    depths = {s.name: s.depth or 1 for s in sites}
    return hold(sites, [{n: (depths[n] - len(f.scale), f.a.shape[-1]) for n, f in adapter.items()} for adapter in adapters])
