"""Init[B] (arXiv:2406.08447, section 3): A = 0 and B random, the other way round than the default's Init[A].

B ~ U(-1/sqrt(r), 1/sqrt(r)): the variance is of order 1/r, by what enters B, as A's is by what enters A in the default.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, B, Init, InitConfig, register_init


class ZeroAConfig(InitConfig):
    kind: Literal["zero_a"] = "zero_a"


class ZeroA(Init):
    """A = 0, B uniform."""

    section = ZeroAConfig

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        experts = () if site.experts is None else (site.experts,)
        drawn = 2 * random.random((rank, *experts, site.outputs), np.float32) - 1
        return {B: np.moveaxis(drawn, 0, -2) * np.float32(1 / np.sqrt(rank))}


register_init("zero_a", ZeroA())
