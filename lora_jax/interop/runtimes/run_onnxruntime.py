"""Runs an ONNX graph by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime

_DTYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32"}


def load(path: str) -> tuple[list[tuple[str, list[Any], str]], Callable[[dict[str, Any]], Any]]:
    """The inputs, and what runs it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [(one.name, list(one.shape), _DTYPES[one.type]) for one in session.get_inputs()]
    return inputs, lambda arrays: session.run(None, arrays)
