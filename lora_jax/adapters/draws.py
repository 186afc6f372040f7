"""Numbers that other programs can draw too: PyTorch's uniform ones from a seed, and the singular vectors of a weight."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from ..errors import InputError
from .sites import Site


def torch_uniform(seed: int, shapes: list[tuple[int, ...]], bounds: list[float]) -> list[np.ndarray]:
    """What `torch.empty(shape).uniform_(-bound, bound, generator=g)` gives, shape after shape, of a CPU generator with this seed.

    Args:
        seed: from 0 to 2^32 - 1.
        shapes, bounds: of each array.

    Returns:
        float32 arrays. PyTorch takes the lower 24 bits of each number of a Mersenne Twister.
    """
    twister = np.random.RandomState(seed)._bit_generator
    found = []
    for shape, bound in zip(shapes, bounds, strict=True):
        raw = twister.random_raw(int(np.prod(shape))).astype(np.uint32) & np.uint32((1 << 24) - 1)
        unit = raw.astype(np.float32) * np.float32(2.0**-24)
        low, high = np.float32(-bound), np.float32(bound)
        found.append((unit * (high - low) + low).reshape(shape))
    return found


_KEPT: OrderedDict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
_KEPT_BYTES = 512 * 2**20


def singular_vectors(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition `weight = U diag(s) V`, computed in float64 and rounded to float32.

    Of each pair of vectors the largest entry of U's is positive: another LAPACK gives the same signs. The newest ones are kept, since the
    members of a sweep ask for those of the same weights.

    Args:
        weight: (inputs, outputs) float32.

    Returns:
        U (inputs, k), s (k,) from the largest down and V (k, outputs), float32, k being the smaller of the two sizes.
    """
    key = hashlib.blake2b(np.ascontiguousarray(weight).tobytes(), digest_size=16, key=str(weight.shape).encode()).digest()
    if key not in _KEPT:
        u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
        _KEPT[key] = ((u * signs).astype(np.float32), s.astype(np.float32), (signs[:, None] * v).astype(np.float32))
        while sum(a.nbytes for kept in _KEPT.values() for a in kept) > _KEPT_BYTES and len(_KEPT) > 1:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]


def check_singular_rank(site: Site, rank: int) -> None:
    """`InputError` where a site's weight has fewer singular vectors than a method wants."""
    if rank > min(site.inputs, site.outputs):
        raise InputError(f"adapter.rank: {site.name} has {min(site.inputs, site.outputs)} singular vectors, not {rank}.")
