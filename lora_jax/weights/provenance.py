"""Which base it is: the checkpoint it came from, and the fingerprint of its parameters.

Two models with equal names, shapes and bits have the same fingerprint, wherever their weights lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint a base was loaded from.

    Attributes:
        source: as it was given to `load_model`.
        text: the checkpoint's Hugging Face config, as JSON: a model's structure holds what can be compared and hashed.
        prefix: what stands before the family's tensor names in that checkpoint (`bert.` where it was saved with a head).
    """

    source: str
    text: str
    prefix: str

    @classmethod
    def of(cls, source: str, config: Mapping[str, Any], prefix: str) -> Origin:
        """From the config as a dict."""
        return cls(source, json.dumps(config, sort_keys=True), prefix)

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's Hugging Face config."""
        return json.loads(self.text)

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        return self.config["model_type"]


def fingerprint(model: nnx.Module, like: nnx.Module | None = None) -> str:
    """16 hex digits of a base's parameters: names, shapes, dtypes and every bit.

    Each parameter is summed on its devices, every number weighted by its place, so that a sharded model is not gathered.

    Args:
        model: the base.
        like: the same base in other dtypes, of which the parameters may be shapes: the fingerprint is then of `model` rounded to those.
    """
    params, kinds = _base_parameters(model), _base_parameters(model if like is None else like)
    names = sorted(params)
    dtypes = [kinds[n].dtype for n in names]
    arrays = [params[n].get_value() for n in names]
    sums = jax.jit(lambda arrays: jnp.stack([_checksum(a.astype(d)) for a, d in zip(arrays, dtypes, strict=True)]))(arrays)
    digest = hashlib.sha256()
    for name, dtype, pair in zip(names, dtypes, jax.device_get(sums), strict=True):
        digest.update(f"{name} {params[name].shape} {dtype} {pair[0]} {pair[1]}\n".encode())
    return digest.hexdigest()[:16]


def _base_parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Path -> parameter of the base; adapters' arrays (`nnx.LoRAParam`) are none."""
    found = (
        (path, v) for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Param | nnx.BatchStat) and not isinstance(v, nnx.LoRAParam)
    )
    return {".".join(map(str, path)): v for path, v in found}


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of what a Hugging Face tokenizer does: its tokens and rules, its special tokens and its chat template."""
    rules = tokenizer.backend_tokenizer.to_str()
    rules = rules[rules.find('"added_tokens"') :]  # before that: the padding and truncation of the newest call
    parts = (rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def arrays_digest(columns: Sequence[Sequence[np.ndarray] | None]) -> str:
    """16 hex digits of lists of arrays, such as the tokens and targets of examples: every length and every bit, in order."""
    digest = hashlib.sha256()
    for arrays in columns:
        known: Any = arrays  # arrays that lie one after the other in a file have these
        lengths = getattr(known, "lengths", None)
        digest.update(b"none" if arrays is None else np.array([len(a) for a in arrays] if lengths is None else lengths, np.int64).tobytes())
        if arrays:
            found = np.concatenate([np.asarray(a) for a in arrays]) if lengths is None else known.whole
            whole = np.ascontiguousarray(found)
            digest.update(f"{whole.shape} {whole.dtype}".encode())
            digest.update(whole.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _checksum(array: jax.Array) -> jax.Array:
    """Two sums of the numbers' bits modulo 2^32, each number times an odd weight that follows from its place."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    sums = []
    for multiplier in (2654435761, 2246822519):  # odd, far from simple fractions of 2^32
        weight = (place * jnp.uint32(multiplier)) ^ (place >> 15) | 1
        sums.append(jnp.sum(bits * weight, dtype=jnp.uint32))
    return jnp.stack(sums)
