"""Orthogonal init (https://datta0.github.io/posts/rethink-lora-init/), as PEFT's `orthogonal`: neither factor is 0, their product is.

A takes the odd rows of a random orthogonal (r x r) matrix Q and B its even ones: with X (in x r/2), Y (r/2 x out) ~ N(0, 1),
`A^T = X Q_odd / 10`, `B^T = Y^T Q_even / 10`, so that `B A = Y^T Q_even Q_odd^T X^T / 100 = 0`, but for rounding. The rank is even.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ...errors import InputError
from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, B, Init, InitConfig, register_init


class OrthogonalConfig(InitConfig):
    kind: Literal["orthogonal"] = "orthogonal"


class Orthogonal(Init):
    """A and B of orthogonal parts."""

    section = OrthogonalConfig
    kinds = ("linear", "convolution")
    peft = "orthogonal"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """The rank is even."""
        if rank % 2:
            raise InputError(f"adapter.init: 'orthogonal' halves the rank, and {rank} (at {site.name}) is odd.")

    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        q, _ = np.linalg.qr(random.standard_normal((rank, rank)))
        a = random.standard_normal((site.inputs, rank // 2)) @ q[0::2]
        b = q[1::2].T @ random.standard_normal((rank // 2, site.outputs))
        return {A: a / 10, B: b / 10}


register_init("orthogonal", Orthogonal())
