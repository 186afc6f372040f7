"""Runs a checkpoint, a Hugging Face folder or a GGUF file, by lora-jax itself."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.interop.program import program_of
from lora_jax.models.families.base import HEAD_CLASSES
from lora_jax.models.load import load_model


def load(path: str) -> tuple[list[tuple[str, list[Any], str]], Callable[[dict[str, Any]], Any]]:
    """The inputs, and what runs it. `path` is a GGUF file, or the folder's config.json."""
    file = pathlib.Path(path)
    source, head = (file, None) if file.suffix == ".gguf" else (file.parent, _head(json.loads(file.read_text(encoding="utf-8"))))
    program = program_of(load_model(str(source), head=head))
    call, weights = jax.jit(program.call), jax.device_put(dict(program.weights))
    inputs = [(one.name, list(one.dims), one.dtype) for one in program.inputs]
    return inputs, lambda arrays: jax.block_until_ready(call(weights, *(arrays[name] for name, _, _ in inputs)))


def _head(config: dict[str, Any]) -> str | None:
    """The kind of head that the checkpoint was saved with."""
    names = config.get("architectures") or []
    return next((kind for kind, suffix in HEAD_CLASSES.items() if any(name.endswith(suffix) for name in names)), None)
