"""Saved adapters: the arrays that a member trains or keeps, in an Orbax checkpoint, beside an `adapter.json` that says what they belong to
(the base's fingerprint, the method, every rank and scale) and holds a digest of every file and of itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.layout import ResolvedAdapter
from ..adapters.partition import Arrays
from ..errors import InputError, warn
from .checkpoint import checkpointer, digest, digests, reason, sized

_ADAPTER_FORMAT = 2  # 1 had neither identity nor digests
_ADAPTER_FACTS = "adapter.json"


def adapter_identity(fingerprint: str, spec: ResolvedAdapter) -> dict[str, Any]:
    """What an adapter belongs to: JSON values that are equal for the same adapter of the same base, and for no other.

    Args:
        fingerprint: of the base, in the dtype that the adapter was trained over.
        spec: what the member adapts.
    """
    sites = {
        name: {"ranks": site.ranks.tolist()}
        | {setting: np.asarray(values, np.float32).tolist() for setting, values in site.settings.items()}
        for name, site in spec.sites.items()
    }
    return {"base": fingerprint, "method": spec.method.name, "sites": sites}


def save_adapter(folder: Path, arrays: Arrays, identity: dict[str, Any], classes: Sequence[str] | None = None) -> None:
    """Writes the arrays to `folder`, which appears complete or not at all.

    Args:
        folder: where; replaced if it exists.
        arrays: one member's, in its solo shapes.
        identity: of the adapter (`adapter_identity`).
        classes: of a classification, in the order of its logits: who takes the adapter away needs no data to know them.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with checkpointer(alone=True) as orbax:
        orbax.save((part / "arrays").resolve(), sized({n: np.asarray(a) for n, a in arrays.items()}))
    shapes = {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()}
    facts = {"format": _ADAPTER_FORMAT, **identity, "arrays": shapes, "classes": list(classes) if classes else None}
    facts["files"] = digests(part / "arrays")
    (part / _ADAPTER_FACTS).write_text(json.dumps(facts | {"digest": _facts_digest(facts)}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load_adapter(folder: Path, expected: Arrays, identity: dict[str, Any]) -> Arrays:
    """The arrays in `folder`, checked against the names and shapes a model asks for and the digests they were saved with.

    An adapter of a version that saved neither is read, with a warning.

    Args:
        folder: as it was given to `save_adapter`.
        expected: arrays of the names, shapes and dtypes that are wanted.
        identity: what the arrays are to be put on (`adapter_identity`).

    Raises:
        InputError: nothing is there, it is damaged, or it belongs to another base, model or adapter config.
    """
    facts = _facts(folder)
    try:
        shapes = {name: (tuple(shape), dtype) for name, (shape, dtype) in facts["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / _ADAPTER_FACTS}: damaged.") from None
    wanted = {name: (tuple(a.shape), str(a.dtype)) for name, a in expected.items()}
    if shapes != wanted:
        unlike = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise InputError(f"{folder}: does not fit this model and adapter config, in {', '.join(unlike[:4])}.")
    if facts["format"] == 1:
        warn(f"{folder}: saved by an older version, which kept no fingerprint of the base and no digests: not checked.")
    else:
        _check_identity(folder, facts, identity)
        for file, known in facts["files"].items():
            if not (folder / "arrays" / file).is_file() or digest(folder / "arrays" / file) != known:
                raise InputError(f"{folder}: damaged (the file arrays/{file} is not as it was written).")
    target = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    try:
        with checkpointer(alone=True) as orbax:
            arrays = orbax.restore((folder / "arrays").resolve(), sized(target))
            return {n: arrays[n] if a.size else jnp.zeros(a.shape, a.dtype) for n, a in target.items()}
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise InputError(f"{folder}: damaged ({reason(error)}).") from None


def _check_identity(folder: Path, facts: dict[str, Any], identity: dict[str, Any]) -> None:
    """`InputError` where an adapter belongs to something else; the message says to what."""
    if facts["base"] != identity["base"]:
        raise InputError(
            f"{folder}: was trained over a base with other weights (fingerprint {facts['base']}) than model.source has now "
            f"({identity['base']}). Put the old weights back, or start over with --fresh."
        )
    if facts["method"] != identity["method"]:
        raise InputError(f"{folder}: was trained with adapter.method {facts['method']}, and the config says {identity['method']}.")
    old, new = facts["sites"], identity["sites"]
    for site in sorted(old.keys() | new.keys()):
        if site not in old or site not in new:
            raise InputError(f"{folder}: was trained {'with' if site in old else 'without'} {site}; adapter.targets of the config differs.")
        for name in old[site].keys() | new[site].keys():
            if old[site].get(name) != new[site].get(name):
                raise InputError(f"{folder}: was trained with other {name} at {site} than the config's adapter section gives now.")


def saved_classes(folder: Path) -> tuple[str, ...] | None:
    """The classes that the adapter in `folder` was trained to tell apart, in order; None where it was no classification.

    Raises:
        InputError: nothing is there, or it is damaged.
    """
    classes = _facts(folder).get("classes")
    if classes is not None and not (isinstance(classes, list) and len(classes) > 1 and all(isinstance(c, str) for c in classes)):
        raise InputError(f"{folder / _ADAPTER_FACTS}: damaged.")
    return None if classes is None else tuple(classes)


def _facts(folder: Path) -> dict[str, Any]:
    """What `adapter.json` says, found as it was written."""
    damaged = InputError(f"{folder / _ADAPTER_FACTS}: damaged.")
    try:
        facts = json.loads((folder / _ADAPTER_FACTS).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no saved adapter here.") from None
    except (OSError, ValueError):
        raise damaged from None
    if not isinstance(facts, dict):
        raise damaged
    own = facts.pop("digest", None)
    # One that says neither its format nor a digest is none of ours: a flipped bit makes no new adapter an old one.
    if not (facts.get("format") == 1 and own is None) and own != _facts_digest(facts):
        raise damaged
    if facts["format"] not in (1, _ADAPTER_FORMAT):
        raise InputError(f"{folder / _ADAPTER_FACTS}: written by a newer version (format {facts['format']}).")
    return facts


def _facts_digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
