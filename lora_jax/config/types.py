"""What every section of the config is made of: its base class, kinds of numbers, amounts of memory; and what tasks that read rows share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ..errors import hint

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
    """What the sections of all tasks have in common, whether they read rows (`TaskConfig`) or not."""

    kind: str = Field(description="The kind of task. Each kind has its own keys.")

    @property
    def title(self) -> str:
        """What is learned of, in short, for titles: where the rows are, without its folder."""
        return getattr(self, "source", "").rsplit("/", 1)[-1]


# Marks a key that holds a path, or a source that may be one: `load_config` takes it relative to the config's folder.
SOURCE: dict[str, Any] = {"format": "source"}
_other_source = partial(Field, None, json_schema_extra=SOURCE)


class MixtureSource(Section):
    source: str = Field(description="As task.source.")
    weight: float | None = Field(
        default=None,
        description="Share of the training rows, relative to the other sources'. All have one, or none: then each row is used once.",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="As task.columns, of this source alone.")


class TaskConfig(TaskSection):
    """What the sections of all tasks that read rows have in common; each task's own adds its keys (`tasks/`)."""

    source: str = Field(
        description=(
            "A .csv/.tsv/.jsonl/.parquet/.txt file (also .gz, .bz2), a folder, hf://org/name[@revision][:config[/split]], "
            "or package://import_name/path."
        ),
        json_schema_extra=SOURCE,
    )
    sources: list[MixtureSource] = Field(
        default_factory=list,
        description="In place of source, a mixture of several: [{source: ..., weight: ...}, ...].",
        json_schema_extra=SOURCE,
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Other names for columns: what a source calls one -> what the other keys call it."
    )
    eval_source: str | None = _other_source(description="A separate held-out file. Without it, `eval_size` rows of `source` are held out.")
    eval_size: PositiveInt | Literal["all"] = Field(
        default=500, description="Number of held-out rows (with `eval_source`: the number of its rows that are used, or `all`)."
    )
    test_source: str | None = _other_source(description="A separate test file: scored once, when a member ends; nothing is chosen by it.")
    test_size: PositiveInt | Literal["all"] | None = Field(None, description="Number of test rows. Default: all of `test_source`, or none.")
    train_size: PositiveInt | None = Field(default=None, description="Number of training rows to use, after shuffling. Default: all.")
    split_seed: DataSeed = Field(default=0, description="Seed of the split into training, held-out and test rows.")
    max_length: Steps = Field(default=128, description="Maximal number of tokens of an example; longer ones are truncated.")
    drop: dict[str, list[str]] = Field(default_factory=dict, description="Rows to exclude: column -> values.")
    token_cache: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "Keep the rows' tokens in files below tracking.dir that are mapped into memory, and found by later runs. auto: where the files "
            "read have 16 MB or more together, and the task can."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _of_several(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("sources"):
            return values
        for one in values["sources"] if isinstance(values["sources"], list) else ():
            for key in one if isinstance(one, dict) else ():
                if key not in MixtureSource.model_fields:
                    raise ValueError(f"'sources': there is no key '{key}'. {hint(str(key), MixtureSource.model_fields)}".rstrip(". "))
        return {"source": "", **values}

    @model_validator(mode="after")
    def _sources(self) -> TaskConfig:
        if not self.sources:
            return self
        if self.source:
            raise ValueError("'source' and 'sources' do not go together")
        named = [one.source for one in self.sources]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ValueError(f"'sources' names {twice} twice; give it a larger weight")
        for one in self.sources:
            if one.weight is not None and not 0 < one.weight < float("inf"):
                raise ValueError(f"'sources': the weight of {one.source} is {one.weight:g}; it must be above 0")
        if len({one.weight is None for one in self.sources}) > 1:
            raise ValueError("'sources': all have a weight, or none")
        return self

    @property
    def title(self) -> str:
        """Where the rows are, without their folders."""
        return " + ".join(name.rsplit("/", 1)[-1] for name in ([one.source for one in self.sources] or [self.source]))

    @model_validator(mode="after")
    def _eval_size(self) -> TaskConfig:
        for part in ("eval", "test"):
            if getattr(self, f"{part}_size") == "all" and getattr(self, f"{part}_source") is None:
                raise ValueError(f"'{part}_size: all' needs '{part}_source': of 'source' some rows are left to train on")
        return self
