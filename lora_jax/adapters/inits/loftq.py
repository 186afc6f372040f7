"""LoftQ (arXiv:2310.08659, algorithm 1): the adapter starts as what rounding the weight to few bits loses.

From A B = 0, `iterations` times: `Q = round(W - s B A)`, and `s B A` = the best rank-r approximation of W - Q (its SVD, half of the
singular values in each factor). Rounding is done in float: `nf4` (arXiv:2305.14314, appendix E) and `int4` in blocks of 64 weights, each
by its largest magnitude; `int8` row by row of W (outputs, inputs).

The base stays as it was loaded, so the site computes (W - s B0 A0 + s B A) x, and W - s B0 A0 differs from Q by what rank r could not
hold of W - Q. An export with the shifted base writes the weight that rounds to Q with that error and no more.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...config.types import PositiveInt
from ..parameters import SiteData
from ..sites import Site
from .base import Arrays, Init, InitConfig, check_rank, register_init, shared_out

Rounding = Literal["nf4", "int4", "int8"]
BLOCK = 64
# Quantiles of N(0, 1) scaled to [-1, 1], as in the QLoRA paper.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


class LoftqConfig(InitConfig):
    kind: Literal["loftq"] = "loftq"
    rounding: Rounding = Field(default="nf4", description="What weights are rounded to: nf4, int4 or int8.")
    iterations: PositiveInt = Field(default=1, description="Rounds of rounding and decomposing.")


class Loftq(Init):
    """What rounding loses."""

    section = LoftqConfig
    splits = True
    peft = "loftq"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are as many singular values."""
        check_rank("loftq", site, rank)

    def factors(self, section: LoftqConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        def decompose() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            weight = data.weight().astype(np.float64).swapaxes(-1, -2)
            change: Any = 0.0
            for _ in range(section.iterations):
                u, s, v = np.linalg.svd(weight - rounded(weight - change, section.rounding), full_matrices=False)
                u, s, v = u[..., :rank], s[..., :rank], v[..., :rank, :]
                change = (u * s[..., None, :]) @ v
            return v.swapaxes(-1, -2), s, u.swapaxes(-1, -2)

        found = data.once(("loftq", section.rounding, section.iterations, rank), decompose)
        return shared_out(*found, data.settings["scale"])


def rounded(weight: np.ndarray, to: Rounding) -> np.ndarray:
    """A weight (..., outputs, inputs) rounded to what few bits can hold, in its own dtype."""
    if to == "int8":
        unit = np.abs(weight).max(-1, keepdims=True) / 127
        return np.rint(weight / np.where(unit > 0, unit, 1)) * unit
    flat = weight.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    relative = blocks / np.where(largest > 0, largest, 1)
    if to == "nf4":
        near = NF4[np.searchsorted((NF4[1:] + NF4[:-1]) / 2, relative)]
    else:
        near = np.rint(7 * relative) / 7
    return (near * largest).reshape(-1)[: len(flat)].reshape(weight.shape)


register_init("loftq", Loftq())
