"""What every section of the config is made of: its base class, and the kinds of numbers.

Amounts of memory as people write them.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def to_bytes(size: object) -> int:
    """Bytes of a size: a whole number of them, or a number with a unit, decimal (KB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    >>> to_bytes("8GB"), to_bytes("1.5 GiB"), to_bytes(1024)
    (8000000000, 1610612736, 1024)

    Raises:
        ValueError: it is none, or is not above 0.
    """
    text = str(size).strip() if isinstance(size, (int, float, str)) and not isinstance(size, bool) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.upper())
    value = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if value < 1:
        raise ValueError(f"must be bytes or a size such as 8GB or 512MiB, got {size!r}")
    return value


def size_text(size: int) -> str:
    """Bytes for a person to read.

    >>> size_text(1610612736)
    '1.61 GB'
    """
    unit = next((u for u in ("TB", "GB", "MB", "KB") if size >= _UNITS[u[0]]), "B")
    return f"{size} B" if unit == "B" else f"{size / _UNITS[unit[0]]:.3g} {unit}"


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
