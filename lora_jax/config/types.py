"""What every section of the config is made of: its base class, kinds of numbers, and amounts of memory."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

_SIZE = TypeAdapter(ByteSize)


def to_bytes(size: object) -> int:
    """Bytes of a size: a whole number of them, or a number with a unit, decimal (KB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    >>> to_bytes("8GB"), to_bytes("1.5 GiB"), to_bytes(1024)
    (8000000000, 1610612736, 1024)

    Raises:
        ValueError: it is none, or is not above 0.
    """
    try:
        value = int(_SIZE.validate_python(size, strict=True))
    except ValidationError:
        value = 0
    if value < 1:
        raise ValueError(f"must be bytes or a size such as 8GB or 512MiB, got {size!r}")
    return value


def size_text(size: int) -> str:
    """Bytes for a person to read.

    >>> size_text(1610612736)
    '1.61 GB'
    """
    # Not ByteSize.human_readable, which keeps one decimal: 1.6GB, and 1023.9MB.
    for unit, count in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= count:
            return f"{size / count:.3g} {unit}"
    return f"{size} B"


PositiveInt = Annotated[int, Field(gt=0)]
LARGEST_RANK = 2**16  # beyond the width of every model; no array is asked for before it is known to be one


def _possible_rank(rank: int) -> int:
    if rank > LARGEST_RANK:
        raise ValueError(f"a rank is at most {LARGEST_RANK}, got {rank if rank < 10**30 else 'a number of 31 digits or more'}")
    return rank


Rank = Annotated[PositiveInt, AfterValidator(_possible_rank)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# What NumPy, JAX and the run's files can hold: beyond it a value would overflow where nobody looks for it.
Steps = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DataSeed = Annotated[int, Field(ge=0, lt=2**63)]
# More than anybody means, and what is built at once from them still fits.
Points = Annotated[int, Field(gt=0, le=1_000_000)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Bytes = Annotated[
    int, BeforeValidator(to_bytes), WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]})
]


class Section(BaseModel):
    """A part of the config: unknown keys are errors and values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TaskSection(Section):
    """What the sections of all tasks have in common, whether they read rows (`schema.TaskConfig`) or not."""

    kind: str = Field(description="The kind of task. Each kind has its own keys.")

    @property
    def title(self) -> str:
        """What is learned of, in short, for titles: where the rows are, without its folder."""
        return getattr(self, "source", "").rsplit("/", 1)[-1]
