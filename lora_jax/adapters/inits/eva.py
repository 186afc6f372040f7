"""EVA (arXiv:2410.07170, section 3.2): A starts as the directions in which a layer's inputs vary most, and B = 0.

With the inputs X (tokens x in) = U S V^T: `A = V_r^T`; with `whiten`, `A = V_r^T / sqrt(S_r)`. V is found from X^T X, the sum over the
tokens of `adapter.init_batches` batches; X is not centred. Ranks stay where they are (the paper's rho = 1): every layer has the rank
that the config says.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ..parameters import SiteData
from ..sites import Site
from .base import A, Arrays, Init, InitConfig, moment_of, register_init


class EvaConfig(InitConfig):
    kind: Literal["eva"] = "eva"
    whiten: bool = Field(default=False, description="Divide each direction by the root of its singular value.")


class Eva(Init):
    """The principal directions of the inputs."""

    section = EvaConfig
    kinds = ("linear",)
    wants = frozenset({"moment"})
    peft = "eva"

    def factors(self, section: EvaConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        most = max(rank, data.largest)

        def decompose() -> tuple[np.ndarray, np.ndarray]:
            values, vectors = np.linalg.eigh(moment_of(data, "eva") * data.statistics.tokens)
            return vectors[:, ::-1][:, :most].copy(), np.sqrt(np.maximum(values[::-1][:most], 0))

        directions, singular = (found[..., :rank] for found in data.once(("eva", most), decompose))
        if not section.whiten:
            return {A: directions}
        return {A: directions / np.sqrt(np.maximum(singular, np.finfo(np.float32).eps * singular[0]))}


register_init("eva", Eva())
