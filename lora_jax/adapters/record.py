"""What an adapted model remembers of where its adapter came from, so that it can be written as it was asked for.

The arrays alone say what the model computes, but not how it was put: whether a scale of 2 is 16 / 8 or rank-stabilised, or that the
targets were `all-linear`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from ..config.schema import AdapterConfig

_ATTRIBUTE = "adapter_record"


@dataclasses.dataclass(frozen=True)
class Record:
    """All text, so that it can be part of a model's structure.

    Attributes:
        config: `AdapterConfig`, as JSON.
        foreign: what else the file that it was loaded from said, as JSON; empty for an adapter made here.
    """

    config: str
    foreign: str = ""


def remember(model: nnx.Module, config: AdapterConfig, foreign: str = "") -> None:
    """Notes at the root of an adapted model what its adapter is, in place of any earlier note."""
    owner: Any = model
    setattr(owner, _ATTRIBUTE, nnx.static(Record(config.model_dump_json(), foreign)))


def recall(model: nnx.Module) -> Record | None:
    """What was noted, at the root or at a module that another now wraps."""
    return next((r for _, m in nnx.iter_modules(model) if (r := getattr(m, _ATTRIBUTE, None)) is not None), None)
