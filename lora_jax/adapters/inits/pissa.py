"""PiSSA (arXiv:2404.02948, eqs. 2-4): the adapter starts as the principal part of the weight, and what is left stays frozen.

With W = U S V^T: `B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) V_r^T`; the site computes (W - s B0 A0 + s B A) x. `niter` takes a fast SVD
in place of the exact one (Halko, arXiv:0909.4061, algorithm 4.4, as `torch.svd_lowrank`): so many subspace iterations from r random
vectors. PEFT's name for it is `pissa_niter_N`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...config.types import NonNegativeInt
from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, Init, InitConfig, check_rank, register_init, shared_out, singular


class PissaConfig(InitConfig):
    kind: Literal["pissa"] = "pissa"
    niter: NonNegativeInt | None = Field(default=None, description="Subspace iterations of the fast SVD. Default: the exact SVD.")


class Pissa(Init):
    """The weight's principal part."""

    section = PissaConfig
    splits = True
    peft = "pissa"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are as many singular values."""
        check_rank("pissa", site, rank)

    def factors(self, section: PissaConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        if section.niter is None:
            found = singular(data, rank)
        else:
            found = fast_svd(data.weight().astype(np.float64), rank, section.niter, random)
        return shared_out(*found, data.settings["scale"])

    def to_peft(self, section: PissaConfig) -> str:
        """With the number of iterations in the name."""
        return "pissa" if section.niter is None else f"pissa_niter_{section.niter}"

    def of_peft(self, value: str | bool) -> dict[str, Any] | None:
        """`pissa`, or `pissa_niter_N`."""
        found = re.fullmatch(r"pissa(?:_niter_(\d+))?", value) if isinstance(value, str) else None
        return None if found is None else {} if found[1] is None else {"niter": int(found[1])}


def fast_svd(weight: np.ndarray, rank: int, iterations: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular values and vectors of (..., inputs, outputs), nearly; as `singular` gives them."""
    turned = weight.swapaxes(-1, -2)
    basis = np.linalg.qr(weight @ random.standard_normal((weight.shape[-1], rank)))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight @ np.linalg.qr(turned @ basis)[0])[0]
    p, s, q = np.linalg.svd(basis.swapaxes(-1, -2) @ weight, full_matrices=False)
    return basis @ p, s, q


register_init("pissa", Pissa())
