"""MiLoRA (arXiv:2406.09044, section 3): the adapter starts as the minor part of the weight; the principal part stays frozen.

With W = U S V^T and the r smallest singular values: `B = U_m sqrt(S_m / s)`, `A = sqrt(S_m / s) V_m^T`; the site computes
(W - s B0 A0 + s B A) x. The paper has no scale; divided by it, s B0 A0 is the minor part whatever alpha is.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, Init, InitConfig, check_rank, register_init, shared_out, singular


class MiloraConfig(InitConfig):
    kind: Literal["milora"] = "milora"


class Milora(Init):
    """The weight's minor part."""

    section = MiloraConfig
    splits = True

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are as many singular values."""
        check_rank("milora", site, rank)

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        return shared_out(*singular(data, rank, "trailing"), data.settings["scale"])


register_init("milora", Milora())
