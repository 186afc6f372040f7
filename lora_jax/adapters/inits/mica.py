"""MiCA (arXiv:2604.01694): B is frozen, the r left singular vectors of W that belong to its smallest singular values; A starts at 0 and
trains alone. The product starts at 0, so the weight stays as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, B, Init, InitConfig, check_rank, register_init, singular


class MicaConfig(InitConfig):
    kind: Literal["mica"] = "mica"


class Mica(Init):
    """A = 0, B the minor singular vectors, frozen."""

    section = MicaConfig
    kinds = ("linear", "embedding", "convolution", "expert")
    frozen = "lora_b"
    peft = "mica"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are as many singular vectors."""
        check_rank("mica", site, rank)

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        return {B: singular(data, rank, "trailing")[2]}


register_init("mica", Mica())
