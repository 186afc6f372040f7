"""OLoRA (arXiv:2406.01775, algorithm 1): the adapter starts as the leading part of the weight's QR decomposition.

With W = Q R (W outputs x inputs): `B = Q[:, :r]`, `A = R[:r]`, not divided by the scale; the site computes (W - s B0 A0 + s B A) x.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, B, Init, InitConfig, check_rank, register_init


class OloraConfig(InitConfig):
    kind: Literal["olora"] = "olora"


class Olora(Init):
    """Q and R of the weight."""

    section = OloraConfig
    splits = True
    peft = "olora"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """Q has as many columns."""
        check_rank("olora", site, rank)

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        most = max(rank, data.largest)

        def decompose() -> tuple[np.ndarray, np.ndarray]:
            q, r = np.linalg.qr(data.weight().astype(np.float64).swapaxes(-1, -2))
            return r[..., :most, :].swapaxes(-1, -2).copy(), q[..., :most].swapaxes(-1, -2).copy()

        a, b = data.once("qr", decompose)
        return {A: a[..., :rank], B: b[..., :rank, :]}


register_init("olora", Olora())
