"""Gaussian init, as diffusers draws LoRA and PEFT's `gaussian`: B = 0 and A ~ N(0, 1/r^2). At an embedding A = 0 and B ~ N(0, 1)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, B, Init, InitConfig, register_init


class GaussianConfig(InitConfig):
    kind: Literal["gaussian"] = "gaussian"


class Gaussian(Init):
    """B = 0, A normal."""

    section = GaussianConfig
    kinds = ("linear", "embedding", "convolution", "expert")
    peft = "gaussian"

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        if site.kind == "embedding":
            return {B: random.standard_normal((rank, site.outputs), np.float32)}
        experts = () if site.experts is None else (site.experts,)
        drawn = random.standard_normal((rank, *experts, site.inputs), np.float32)
        return {A: np.moveaxis(drawn, 0, -1) / np.float32(rank)}


register_init("gaussian", Gaussian())
