"""Saved adapters: a member's trainable arrays in an Orbax checkpoint, with the fingerprint of the base they belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..adapters.partition import Arrays
from ..config.errors import InputError
from .array_files import checkpointer

_FORMAT = 1


def save_adapter(folder: Path, arrays: Arrays, classes: Sequence[str] | None = None) -> None:
    """Writes the arrays to `folder`, which appears complete or not at all.

    Args:
        folder: where; replaced if it exists.
        arrays: one member's, in its solo shapes.
        classes: of a classification, in the order of its logits: who takes the adapter away needs no data to know them.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with checkpointer(alone=True) as orbax:
        orbax.save((part / "arrays").resolve(), {n: np.asarray(a) for n, a in arrays.items()})
    shapes = {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()}
    (part / "adapter.json").write_text(
        json.dumps({"format": _FORMAT, "arrays": shapes, "classes": list(classes) if classes else None}, indent=2)
    )
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load_adapter(folder: Path, expected: Arrays) -> Arrays:
    """The arrays in `folder`, checked against the names and shapes a model asks for.

    Raises:
        InputError: nothing is there, it is damaged, or it belongs to another model or adapter config.
    """
    facts = _facts(folder)
    try:
        shapes = {name: (tuple(shape), dtype) for name, (shape, dtype) in facts["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / 'adapter.json'}: damaged.") from None
    wanted = {name: (tuple(a.shape), str(a.dtype)) for name, a in expected.items()}
    if shapes != wanted:
        unlike = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise InputError(f"{folder}: does not fit this model and adapter config, in {', '.join(unlike[:4])}.")
    target = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    try:
        with checkpointer(alone=True) as orbax:
            return orbax.restore((folder / "arrays").resolve(), target)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise InputError(f"{folder}: damaged ({str(error).splitlines()[0][:120]}).") from None


def saved_classes(folder: Path) -> tuple[str, ...] | None:
    """The classes that the adapter in `folder` was trained to tell apart, in order; None where it was no classification.

    Raises:
        InputError: nothing is there, or it is damaged.
    """
    classes = _facts(folder).get("classes")
    if classes is not None and not (isinstance(classes, list) and len(classes) > 1 and all(isinstance(c, str) for c in classes)):
        raise InputError(f"{folder / 'adapter.json'}: damaged.")
    return None if classes is None else tuple(classes)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "adapter.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no saved adapter here.") from None
    except (OSError, ValueError):
        raise InputError(f"{folder / 'adapter.json'}: damaged.") from None
    if not isinstance(facts, dict):
        raise InputError(f"{folder / 'adapter.json'}: damaged.")
    return facts
