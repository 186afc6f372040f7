"""Runs a StableHLO program by JAX alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export


def load(path: str) -> tuple[list[tuple[str, list[Any], str]], Callable[[dict[str, Any]], Any]]:
    """The inputs, and what runs it. `path` is the manifest's."""
    folder = pathlib.Path(path).parent
    manifest = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    raw = memoryview((folder / manifest["weights"]).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = [(name, entry) for name, entry in json.loads(bytes(raw[8:start])).items() if name != "__metadata__"]
    weights = {
        name: jax.device_put(np.frombuffer(raw[start:][slice(*entry["data_offsets"])], "f4").reshape(entry["shape"]))
        for name, entry in entries
    }
    program = export.deserialize(bytearray((folder / manifest["program"]).read_bytes()))
    call = jax.jit(program.call)
    inputs = [(one["name"], one["dims"], one["dtype"]) for one in manifest["inputs"]]
    return inputs, lambda arrays: jax.block_until_ready(call(weights, *(arrays[name] for name, _, _ in inputs)))
