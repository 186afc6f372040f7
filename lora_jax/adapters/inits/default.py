"""The default init, PEFT's: B = 0 and A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt 5); LoRA's own (arXiv:2106.09685,
section 4.1) with other random numbers. At an embedding A = 0 and B ~ N(0, 1). Each expert draws its own.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, B, Init, InitConfig, register_init


class DefaultConfig(InitConfig):
    kind: Literal["default"] = "default"


class Default(Init):
    """B = 0, A uniform."""

    section = DefaultConfig
    kinds = ("linear", "embedding", "convolution", "expert")
    peft = True

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        # Rank after rank is drawn, so that a smaller rank starts as the leading part of a larger (`adapter.nested_init`).
        if site.kind == "embedding":
            return {B: random.standard_normal((rank, site.outputs), np.float32)}
        experts = () if site.experts is None else (site.experts,)
        drawn = 2 * random.random((rank, *experts, site.inputs), np.float32) - 1
        return {A: np.moveaxis(drawn, 0, -1) * np.float32(1 / np.sqrt(site.inputs))}


register_init("default", Default())
