"""LoRA-GA (arXiv:2407.05000, section 3.2): the adapter starts where its first step is closest to that of full fine-tuning.

With the gradient of the loss G = U S V^T (outputs x inputs), over `adapter.init_batches` batches: of its first 2r singular vectors B
takes r of U and A the r others of V, `A = c V_[1:r]^T`, `B = c U_[r+1:2r]` (`direction: ArB2r`), with `c = out^(1/4) / sqrt(gamma)`
(`scale: stable`). The site computes (W - s B0 A0 + s B A) x. PEFT multiplies B with the singular values besides, and leaves A unscaled.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...config.types import PositiveFloat
from ...errors import InputError
from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, B, Init, InitConfig, check_rank, register_init


class LoraGaConfig(InitConfig):
    kind: Literal["lora_ga"] = "lora_ga"
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        default="ArB2r", description="Which of the 2r vectors A takes: the first r, the last r, every second, or random ones; B the others."
    )
    scale: Literal["stable", "gd_scale", "unit"] = Field(
        default="stable", description="stable: times out^(1/4) / sqrt(gamma); gd_scale: divided by the adapter's scale; unit: as they are."
    )
    gamma: PositiveFloat = Field(default=16.0, description="Gamma of scale: stable; the larger, the smaller the start.")


class LoraGa(Init):
    """Singular vectors of the gradient."""

    section = LoraGaConfig
    kinds = ("linear",)
    splits = True
    wants = frozenset({"gradient"})
    peft = "lora_ga"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """There are twice as many singular vectors."""
        check_rank("lora_ga", site, rank, 2 * rank)

    def factors(self, section: LoraGaConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        gradient, most = data.statistics.gradient, 2 * max(rank, data.largest)
        if gradient is None:
            raise InputError("adapter.init: 'lora_ga' reads the gradient, and none was gathered: train it from a config, on a task.")

        def decompose() -> tuple[np.ndarray, np.ndarray]:
            p, _, q = np.linalg.svd(gradient, full_matrices=False)
            return p[:, :most].copy(), q[:most].copy()

        p, q = data.once(("lora_ga", most), decompose)
        first, second = np.arange(rank), np.arange(rank, 2 * rank)
        if section.direction == "ArBr":
            first, second = np.arange(1, 2 * rank, 2), np.arange(0, 2 * rank, 2)
        elif section.direction == "A2rBr":
            first, second = second, first
        elif section.direction == "random":
            first, second = np.split(random.permutation(2 * rank), 2)
        factor = 1.0
        if section.scale == "stable":
            factor = site.outputs**0.25 / section.gamma**0.5
        elif section.scale == "gd_scale":
            factor = 1 / data.settings["scale"]
        return {A: factor * p[:, first], B: factor * q[second]}


register_init("lora_ga", LoraGa())
