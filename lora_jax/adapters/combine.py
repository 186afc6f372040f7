"""Combining adapters: arithmetic on what each changes in a weight, `D = scale * A B`, and factors of the result.

A sum of low-rank changes is low-rank, and its SVD is taken through the factors' QR decompositions, without ever making D. The methods
that look at single entries make D, one layer of one site at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from ..errors import InputError, hint
from ..parallel.mesh import to_host
from .inject import random_of, site_modules
from .layout import SiteLayout, site_layouts
from .sites import Site

# Method -> the options that go with it; those of SUMS keep the adapters' own entries, the rest prune them.
METHODS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cat": (),
    "svd": ("rank",),
    "ties": ("rank", "density", "majority"),
    "dare_linear": ("rank", "density", "seed"),
    "dare_ties": ("rank", "density", "majority", "seed"),
    "magnitude_prune": ("rank", "density"),
}
SUMS = ("linear", "cat", "svd")
MAJORITIES = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Factors:
    """A low-rank adapter at one site, float32 on the host: what is padded, stacked and combined.

    Attributes:
        a, b: (layers, inputs, rank) and (layers, rank, outputs) of the site's topmost layers; one layer where it is a single weight.
            At an expert site (layers, experts, inputs, rank) and (layers, experts, rank, outputs).
        scale: (layers,).
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """(layers,) columns of A and rows of B that are not padding; 0 where the scale is."""
        used = np.abs(self.a).sum(-2) + np.abs(self.b).sum(-1) > 0
        used = used if used.ndim == 2 else used.any(1)
        return used.sum(-1) * (self.scale != 0)

    def fitted(self, layout: SiteLayout) -> Factors:
        """The same with zeros for the layers and ranks that the layout has besides."""
        layers, rank = (layout.layers or 1) - len(self.scale), layout.rank - self.a.shape[-1]
        a = np.pad(self.a, [(layers, 0), *[(0, 0)] * (self.a.ndim - 2), (0, rank)])
        b = np.pad(self.b, [(layers, 0), *[(0, 0)] * (self.b.ndim - 3), (0, rank), (0, 0)])
        return Factors(a, b, np.pad(self.scale, (layers, 0)))


def factors_of(model: nnx.Module) -> dict[str, Factors]:
    """Site name -> factors, of an adapted model.

    Raises:
        InputError: its method is not low-rank.
    """
    found = {}
    for name, module in site_modules(model).items():
        if (arrays := module.method.low_rank(module)) is None:
            raise InputError(f"adapter.method: the change that '{module.method.name}' makes at {name} is not low-rank.")
        a, b, scale = (to_host(array) for array in arrays)
        found[name] = Factors(a, b, scale) if module.stacked else Factors(a[None], b[None], scale[None])
    return found


def layouts_of(sites: list[Site], adapters: Sequence[dict[str, Factors]]) -> tuple[SiteLayout, ...]:
    """The site layouts that hold all of the adapters."""
    depths = {s.name: s.depth or 1 for s in sites}
    return site_layouts(sites, [{n: (depths[n] - len(f.scale), (f.a.shape[-1],)) for n, f in adapter.items()} for adapter in adapters])


@dataclasses.dataclass(frozen=True)
class Combination:
    """How adapters are combined; `AdapterBank.combine` says what each method does.

    Attributes:
        method: a key of `METHODS`.
        weights: adapter -> weight.
        rank: of the result; None: the largest rank of those combined.
        density: fraction of the entries of each change that pruning keeps, above 0 and at most 1.
        majority: of signs: `total` compares sums of entries, `frequency` counts them.
        seed: of the entries that dare keeps. Which ones depends on it and on the adapter's name, the site and the layer alone.

    Raises:
        InputError: a method or value that is not valid, or an option that is missing or does not go with the method.
    """

    method: str
    weights: Mapping[str, float]
    rank: int | None = None
    density: float | None = None
    majority: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"combine: no method '{self.method}'. {hint(self.method, METHODS)}")
        if not self.weights:
            raise InputError("combine: no adapters to combine.")
        for name, weight in self.weights.items():
            if not np.isfinite(weight):
                raise InputError(f"combine: the weight of '{name}' is {weight}.")
        for option in ("rank", "density", "majority", "seed"):
            if getattr(self, option) is not None and option not in METHODS[self.method]:
                goes_with = ", ".join(m for m, options in METHODS.items() if option in options)
                raise InputError(f"combine: '{self.method}' does not take {option}, which belongs to {goes_with}.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"combine: rank must be at least 1, got {self.rank}.")
        if "density" in METHODS[self.method] and (self.density is None or not 0 < self.density <= 1):
            raise InputError(f"combine: '{self.method}' needs a density above 0 and at most 1, got {self.density}.")
        if self.majority not in (None, *MAJORITIES):
            raise InputError(f"combine: unknown majority '{self.majority}'. {hint(self.majority or '', MAJORITIES)}")

    def changes(self, changes: Mapping[str, np.ndarray], where: str, layer: int = 0) -> np.ndarray:
        """The combined change of one weight.

        Args:
            changes: adapter -> change of the weight, all of one shape; adapters that leave it as it is may be left out.
            where: name of the weight, for the seed.
            layer: of a stacked one.
        """
        weights = [self.weights[name] for name in changes]
        if self.method in SUMS:
            return _weighted_sum(list(changes.values()), weights)
        if self.method.startswith("dare"):
            pruned = [
                prune_random(d, self.density or 1, random_of(self.seed or 0, f"{name}/{where}", layer)) for name, d in changes.items()
            ]
        else:
            pruned = [prune_small(d, self.density or 1) for d in changes.values()]
        if self.method.endswith("ties"):
            return elect_and_merge(pruned, weights, self.majority or "total")
        return _weighted_sum(pruned, weights)

    def factors(self, factors: Mapping[str, Factors], site: str, depth: int) -> Factors:
        """Factors of the combined change at one site, with scale 1.

        Args:
            factors: adapter -> its factors there; adapters that do not adapt it are left out.
            site: its name.
            depth: how many layers it has.
        """
        layers = max(len(f.scale) for f in factors.values())
        found = []
        for below_top in range(layers, 0, -1):
            here = {n: f for n, f in factors.items() if len(f.scale) >= below_top and f.ranks[-below_top]}
            found.append(self._layer(here, -below_top, site, depth - below_top) if here else None)
        rank = max((a.shape[-1] for a, _ in filter(None, found)), default=0) or 1
        some = next(iter(factors.values()))
        a = np.zeros((layers, *some.a.shape[1:-1], rank), np.float32)
        b = np.zeros((layers, *some.b.shape[1:-2], rank, some.b.shape[-1]), np.float32)
        for i, pair in enumerate(found):
            if pair is not None:
                a[i, ..., : pair[0].shape[-1]], b[i, ..., : pair[0].shape[-1], :] = pair
        return Factors(a, b, np.array([pair is not None for pair in found], np.float32))

    def _layer(self, factors: Mapping[str, Factors], index: int, site: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A and B of one layer."""
        own = {n: (f.scale[index] * f.a[index], f.b[index]) for n, f in factors.items()}
        rank = self.rank or max(int(f.ranks[index]) for f in factors.values())
        if self.method in SUMS:
            a = np.concatenate([self.weights[n] * a for n, (a, _) in own.items()], -1)
            b = np.concatenate([b for _, b in own.values()], -2)
            if self.method == "cat":
                return a, b
            return best_product(a, b, None if self.method == "linear" else rank)
        return best_factors(self.changes({n: a @ b for n, (a, b) in own.items()}, site, layer), rank)


def _weighted_sum(changes: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    return sum((np.float32(w) * d for w, d in zip(weights, changes, strict=True)), np.zeros_like(changes[0]))


def prune_small(change: np.ndarray, density: float) -> np.ndarray:
    """The change with its entries of largest magnitude, a fraction `density` of them (rounded down), and 0 for the others."""
    kept = int(density * change.size)
    if kept == change.size:
        return change
    out = np.zeros(change.size, change.dtype)
    largest = np.argpartition(np.abs(change).reshape(-1), change.size - kept)[change.size - kept :]
    out[largest] = change.reshape(-1)[largest]
    return out.reshape(change.shape)


def prune_random(change: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """The change with each entry kept with probability `density` and divided by it, so that the expected change is the same."""
    return np.where(random.random(change.shape, np.float32) < density, change / np.float32(density), np.float32(0))


def elect_and_merge(changes: Sequence[np.ndarray], weights: Sequence[float], majority: str) -> np.ndarray:
    """The weighted mean, at each entry, over the changes whose sign there is the majority's (arXiv:2306.01708, section 3).

    As in PEFT the majority is of the unweighted changes, a tie is a plus, and the mean is over their number.
    """
    stacked = np.stack(changes)
    total = (stacked if majority == "total" else np.sign(stacked)).sum(0)
    agrees = np.sign(stacked) == np.where(total >= 0, 1, -1)
    weighted = _weighted_sum(list(np.where(agrees, stacked, 0)), weights)
    return weighted / np.maximum(agrees.sum(0), 1).astype(weighted.dtype)


def best_factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (..., in, k) with orthonormal columns and B (..., k, out) of the nearest matrix of rank k, the smaller of `rank` and full."""
    u, s, v = np.linalg.svd(change, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * v[..., :rank, :]


def best_product(a: np.ndarray, b: np.ndarray, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`best_factors` of A B without making it: the SVD of the small matrix between the factors' orthonormal bases, in float64.

    Args:
        a, b: (..., in, r) and (..., r, out).
        rank: None: as few as give A B to float32's precision.
    """
    qa, ra = np.linalg.qr(a.astype(np.float64))
    qb, rb = np.linalg.qr(np.swapaxes(b, -1, -2).astype(np.float64))
    u, s, v = np.linalg.svd(ra @ np.swapaxes(rb, -1, -2), full_matrices=False)
    if rank is None:
        # Against the terms of the sum and not the sum: what is left of terms that cancel is rounding.
        scale = (np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)).max()
        rank = max(1, int((s > np.finfo(np.float32).eps * scale).reshape(-1, s.shape[-1]).any(0).sum()))
    return qa @ u[..., :rank], s[..., :rank, None] * (v[..., :rank, :] @ np.swapaxes(qb, -1, -2))
