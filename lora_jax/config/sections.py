"""What every section of the config is made of: its base class, and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from .sizes import to_bytes

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Bytes = Annotated[
    int, BeforeValidator(to_bytes), WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]})
]


class Section(BaseModel):
    """A part of the config: unknown keys are errors and values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
