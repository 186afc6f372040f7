"""What an init is: how the factors of a low-rank method start. Each has one file beside this one, or in a package of its own
(`register_init`, an entry point `lora_jax.inits`).

A method takes inits where its section is a `LowRankConfig` and its `init` calls `start_of`. Papers write W (outputs, inputs) and
W + s B A; here x is a row, so a weight is (inputs, outputs), A (inputs, r) and B (r, outputs).

An init that takes its start out of the weight (`splits`) leaves the base as it is: the site computes `W x + s (B A - B0 A0) x`, with the
start B0, A0 among the member's settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ...config.doors import INITS, Named, register_init
from ...config.schema import AdapterConfig, InitConfig
from ...config.types import PositiveInt
from ...errors import InputError
from ..parameters import SiteData
from ..sites import Site

__all__ = ["Init", "InitConfig", "LowRankConfig", "init_of", "register_init", "singular", "start_of"]

# The names of a low-rank method's arrays.
A, B, A0, B0 = "lora_a", "lora_b", "lora_a0", "lora_b0"
Arrays = dict[str, np.ndarray]
INIT_BATCHES = 8


class LowRankConfig(AdapterConfig):
    """What the sections of methods with low-rank factors have in common."""

    init: Annotated[InitConfig, Named(INITS)] = Field(
        default="default",  # pyright: ignore[reportAssignmentType] - read as every value is
        validate_default=True,
        description="How the factors start: the name of an init, or a section {kind: ..., options}.",
    )
    init_batches: PositiveInt = Field(
        default=INIT_BATCHES, description="Number of training batches that inits which read the data see, in one pass before step 0."
    )


class Init(ABC):
    """A way to start the factors of a low-rank method.

    Attributes:
        section: its config section, with a field `kind` of type `Literal[name]`.
        kinds: the kinds of site whose factors it starts.
        splits: whether it takes its start out of the weight.
        frozen: the name of the factor that does not train; empty where both do.
        wants: which `Statistics` it reads: `moment`, `gradient`.
        peft: PEFT's value of `init_lora_weights` for it; None where PEFT has none.
    """

    section: type[InitConfig]
    kinds: tuple[str, ...] = ("linear", "convolution", "expert")
    splits: bool = False
    frozen: Literal["", "lora_a", "lora_b"] = ""
    wants: frozenset[str] = frozenset()
    peft: str | bool | None = None

    def __repr__(self) -> str:
        return f"<init {type(self).__name__}>"

    def check(self, section: Any, site: Site, rank: int) -> None:
        """`InputError`, naming the key, where a layer of a site cannot start so at this rank."""
        return

    @abstractmethod
    def factors(self, section: Any, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
        """A and B of one layer, by their names `lora_a` and `lora_b`; one that is left out is 0.

        Args:
            section: its own.
            site: the site.
            rank: of the layer.
            random: draws for the member's seed, the site and the layer.
            data: the layer's weight, what it saw of the data, and the number `scale` that the method multiplies the change with.

        Returns:
            (inputs, rank) and (rank, outputs), with the experts in front.
        """

    def to_peft(self, section: Any) -> str | bool | None:
        """PEFT's value of `init_lora_weights` for a section; None where PEFT has none."""
        return self.peft

    def of_peft(self, value: str | bool) -> dict[str, Any] | None:
        """The section that means PEFT's value, as plain values; None where the value is not this init's."""
        return {} if value == self.peft and isinstance(value, bool) == isinstance(self.peft, bool) else None


def init_of(config: AdapterConfig) -> Init:
    """The init that a method's section names; the default one where the section has no such key."""
    return INITS.get(config.init.kind if isinstance(config, LowRankConfig) else "default", "adapter.init")


def of_peft(value: str | bool | None) -> dict[str, Any] | None:
    """The init section, as plain values, that PEFT's value of `init_lora_weights` means; None where no init here is called so."""
    if value is None:
        return None
    word = value.lower() if isinstance(value, str) else value
    sections = ((kind, init.of_peft(word)) for kind, init in INITS.all().items())
    return next(({"kind": kind} | section for kind, section in sections if section is not None), None)


def check_init(config: AdapterConfig, site: Site, rank: int) -> None:
    """Checks that a layer can start as its section says.

    Raises:
        InputError: the init has nothing for this kind of site, or this rank.
    """
    if not isinstance(config, LowRankConfig):
        return
    init, kind = init_of(config), config.init.kind
    if site.kind not in init.kinds:
        article = "an" if site.kind[0] in "aeiou" else "a"
        raise InputError(
            f"adapter.init: '{kind}' starts {' and '.join(init.kinds)} sites, and {site.name} is {article} {site.kind} site. "
            "Leave it out of adapter.targets."
        )
    init.check(config.init, site, rank)


def start_of(config: AdapterConfig, site: Site, rank: int, random: np.random.Generator, data: SiteData) -> Arrays:
    """How the factors of one layer start: what `Method.init` returns of them, float32; an array that is left out is 0."""
    init = init_of(config)
    section = config.init if isinstance(config, LowRankConfig) else init.section()  # pyright: ignore[reportCallIssue]
    found = {name: np.asarray(value, np.float32) for name, value in init.factors(section, site, rank, random, data).items()}
    for array in found.values():
        if not np.isfinite(array).all():
            raise InputError(f"adapter.init: '{section.kind}' gives numbers at {site.name} that are not finite.")
    return found | ({A0: found[A], B0: found[B]} if init.splits else {})


def check_rank(kind: str, site: Site, rank: int, needed: int | None = None) -> None:
    """`InputError` where a weight has fewer singular values than an init needs: `needed`, or as many as the rank."""
    least = min(site.inputs, site.outputs)
    if (rank if needed is None else needed) > least:
        most = least * rank // (rank if needed is None else needed)
        raise InputError(
            f"adapter.init: '{kind}' at rank {rank} needs more singular values than {site.name} has ({least}): a rank of at most {most}."
        )


def singular(data: SiteData, rank: int, end: Literal["leading", "trailing"] = "leading") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest (or smallest) singular values of a weight, with their vectors, float64; `weight = p s q`.

    Returns:
        p (..., inputs, rank), s (..., rank) in descending order, q (..., rank, outputs).
    """
    most = max(rank, data.largest)

    def decompose() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        p, s, q = np.linalg.svd(data.weight().astype(np.float64), full_matrices=False)
        kept = slice(0, most) if end == "leading" else slice(max(0, s.shape[-1] - most), None)
        return p[..., kept].copy(), s[..., kept].copy(), q[..., kept, :].copy()

    p, s, q = data.once(("singular", end), decompose)
    own = slice(0, rank) if end == "leading" else slice(s.shape[-1] - rank, None)
    return p[..., own], s[..., own], q[..., own, :]


def shared_out(p: np.ndarray, s: np.ndarray, q: np.ndarray, scale: float) -> Arrays:
    """A and B that have half of the singular values each, and give `scale * A B = p s q`."""
    root = np.sqrt(s / scale)
    return {A: p * root[..., None, :], B: root[..., :, None] * q}


def moment_of(data: SiteData, kind: str) -> np.ndarray:
    """The mean of `x x^T` over the tokens that a layer saw, (inputs, inputs) float64.

    Raises:
        InputError: it saw none.
    """
    seen = data.statistics
    if seen.moment is None or not seen.tokens:
        raise InputError(f"adapter.init: '{kind}' reads the data, and none was gathered: train it from a config, on a task.")
    return seen.moment / seen.tokens
