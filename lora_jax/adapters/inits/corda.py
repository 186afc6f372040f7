"""CorDA (arXiv:2406.05223, section 3.2): the weight is decomposed in the context of data that it saw.

With C = mean of x x^T over the tokens of `adapter.init_batches` batches, and `W C = U S V^T`: W = U S (V^T C^-1). `mode: ipm` adapts the r
largest components, to learn the new task; `kpm` the r smallest, to keep what the data (then of what is to be kept) needs:
`B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) (V^T C^-1)_r`; the site computes (W - s B0 A0 + s B A) x. C is made invertible as in the
authors' code and PEFT: c = 0.01 times its mean diagonal is added, and c doubled until C C^-1 is within 0.05 of 1. PEFT divides each
text's x by its largest entry first; that changes how a component is shared out between A and B.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, Init, InitConfig, check_rank, moment_of, register_init, shared_out


class CordaConfig(InitConfig):
    kind: Literal["corda"] = "corda"
    mode: Literal["ipm", "kpm"] = Field(
        default="ipm", description="ipm: adapt the components that the data uses most; kpm: those that it uses least."
    )


class Corda(Init):
    """The weight's components, by how much the data uses them."""

    section = CordaConfig
    kinds = ("linear",)
    splits = True
    wants = frozenset({"moment"})
    peft = "corda"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are as many components."""
        check_rank("corda", site, rank)

    def factors(self, section: CordaConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        most = max(rank, data.largest)
        kept = slice(0, most) if section.mode == "ipm" else slice(-most, None)

        def decompose() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            covariance, inverse = regular(moment_of(data, "corda"))
            u, s, v = np.linalg.svd(data.weight().astype(np.float64).T @ covariance, full_matrices=False)
            return (v[kept] @ inverse).T, s[kept].copy(), u[:, kept].T.copy()

        p, s, q = data.once(("corda", section.mode, most), decompose)
        own = slice(0, rank) if section.mode == "ipm" else slice(len(s) - rank, None)
        return shared_out(p[:, own], s[own], q[own], data.settings["scale"])


def regular(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A covariance with as much added to its diagonal as makes it invertible, and its inverse."""
    eye, mean, damp = np.eye(len(covariance)), float(np.mean(np.diag(covariance))) or 1.0, 0.01
    while True:
        shifted = covariance + damp * mean * eye
        inverse = np.linalg.inv(shifted)
        if np.linalg.norm(shifted @ inverse - eye) < 0.05:
            return shifted, inverse
        damp *= 2


register_init("corda", Corda())
