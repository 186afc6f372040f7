"""Calibration: what the linear layers of a base see of a few rows of text, for transforms that choose by it.

The texts, their tokens and the pass over the model are of folders that import this one: whoever loads a base hands the transforms a
function that does it (`TransformContext.calibrate`), `training.statistics.calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from ...config.schema import SOURCE
from ...config.types import DataSeed, PositiveInt, Section, Steps


class CalibrationConfig(Section):
    source: str = Field(description="Rows of text, in the forms of task.source. Nothing is learned of them.", json_schema_extra=SOURCE)
    text: str = Field(default="text", description="Text column.")
    rows: PositiveInt = Field(default=128, description="How many rows, drawn with `seed`.")
    max_length: Steps = Field(default=128, description="Maximal number of tokens of a row; longer ones are truncated.")
    batch_size: PositiveInt = Field(default=8, description="Rows that are computed at once.")
    seed: DataSeed = Field(default=0, description="Seed of the choice of rows.")


class Seen(Protocol):
    """What one layer saw: `squares`, (inputs,) the sum over tokens of x^2; `moment`, (inputs, inputs) the sum of x x^T; float64 each, or
    None where nobody asked for it; and how many `tokens` there were."""

    @property
    def squares(self) -> np.ndarray | None: ...
    @property
    def moment(self) -> np.ndarray | None: ...
    @property
    def tokens(self) -> int: ...


# (source of the checkpoint, base, section, names of layers as in `weights.linear_layers`, `squares` or `moment`)
# -> (name, layer) -> what that saw.
Calibrate = Callable[[str, Any, CalibrationConfig, Sequence[str], str], Mapping[tuple[str, int], Seen]]
