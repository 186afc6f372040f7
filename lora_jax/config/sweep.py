"""The config's `sweep`: where members come from, how they race, how they are packed."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from .types import Bytes, Fraction, NonNegativeInt, PositiveInt, Section


class Distribution(Section):
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value; whole numbers for keys that hold such."
    )
    log_uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="The same, evenly on a logarithmic scale."
    )
    choice: list[Any] | None = Field(default=None, description="One of these, each as likely.")

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        if sum(v is not None for v in (self.uniform, self.log_uniform, self.choice)) != 1:
            raise ValueError("give exactly one of 'uniform', 'log_uniform' and 'choice'")
        bounds = self.uniform or self.log_uniform
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"the lowest value ({bounds[0]}) must be below the highest ({bounds[1]})")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"the values of 'log_uniform' must be above 0, got {self.log_uniform[0]}")
        if self.choice is not None and not self.choice:
            raise ValueError("'choice' has no values")
        return self


class RandomConfig(Section):
    count: PositiveInt = Field(description="How many points are drawn; more of them keep the ones before.")
    seed: NonNegativeInt = Field(default=0, description="Seed of the draws.")
    keys: dict[str, Distribution] = Field(description="Dotted config key -> {uniform: [a, b]}, {log_uniform: [a, b]} or {choice: [...]}.")


class HalvingConfig(Section):
    metric: str | None = Field(
        default=None,
        description="What members are ranked by at a rung: one of the task's metrics on the held-out rows; its own by default.",
    )
    factor: Annotated[float, Field(gt=1)] = Field(default=2.0, description="At each rung one member in so many goes on.")
    rungs: PositiveInt | list[PositiveInt] = Field(
        description="How many rungs, the last at 1 / factor of the steps and each at 1 / factor of the next; or the steps themselves."
    )

    @model_validator(mode="after")
    def _rungs(self) -> HalvingConfig:
        if isinstance(self.rungs, list) and (not self.rungs or any(a >= b for a, b in itertools.pairwise(self.rungs))):
            raise ValueError(f"'rungs' must be steps that rise, got {self.rungs}")
        return self


class SweepConfig(Section):
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Dotted config key -> values; all combinations.")
    zip: dict[str, list[Any]] = Field(
        default_factory=dict, description="Dotted config key -> values that go together: the first of each, the second of each, ..."
    )
    random: RandomConfig | None = Field(default=None, description="Points drawn at random.")
    members: list[dict[str, Any]] = Field(default_factory=list, description="Single members: dotted config key -> value for each.")
    seeds: PositiveInt | list[NonNegativeInt] | None = Field(
        default=None, description="Each point once a seed: so many from training.seed on, or these."
    )
    where: str | None = Field(
        default=None, description="Only members for which this holds, such as: rank <= 8 or targets != 'mlp'. Keys by their last part."
    )
    reference: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Swept key -> value: tables compare each member with the one that has these values and is else the same; "
            "by default with the best."
        ),
    )
    halving: HalvingConfig | None = Field(default=None, description="Successive halving: the losers of each rung stop.")
    max_pack: PositiveInt = Field(default=16, description="Most members trained inside one compiled step.")
    max_padding: Fraction = Field(
        default=0.25,
        description=(
            "Most of a pack's time, compiling included, that may go to what a member has not: ranks above its own, sites it does not "
            "adapt, layers below its lowest. Members further apart train in packs of their own."
        ),
    )
    memory_limit: Bytes | None = Field(
        default=None,
        description="Memory a pack may take on a device: bytes or a size such as 8GB; the device's own by default, none on a CPU.",
    )

    @field_validator("grid", "zip")
    @classmethod
    def _values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            if not values:
                raise ValueError(f"'{key}' has no values")
        return value

    @model_validator(mode="after")
    def _space(self) -> SweepConfig:
        if not (self.grid or self.zip or self.random or self.members or self.seeds):
            raise ValueError("names no key to sweep over: give a 'grid', 'zip', 'random', 'members' or 'seeds'")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError("'zip' needs as many values for each key, got " + ", ".join(f"{k}: {n}" for k, n in lengths.items()))
        parts = [*self.grid, *self.zip, *(self.random.keys if self.random else ()), *(["training.seed"] if self.seeds else ())]
        twice = next((key for key in parts if parts.count(key) > 1), None)
        if twice:
            raise ValueError(f"'{twice}' is swept in two ways")
        return self
