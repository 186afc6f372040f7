"""The config's `sweep` section: the members, successive halving, and packing."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from .types import Bytes, Fraction, NonNegativeInt, PositiveInt, Section


class Distribution(Section):
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value, uniformly distributed. Whole numbers if the key holds whole numbers."
    )
    log_uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value, uniformly distributed on a logarithmic scale."
    )
    choice: list[Any] | None = Field(default=None, description="One of these values, with equal probability.")

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
    count: PositiveInt = Field(description="Number of points to draw. Raising it keeps the earlier points.")
    seed: NonNegativeInt = Field(default=0, description="Seed of the draws.")
    keys: dict[str, Distribution] = Field(description="Dotted config key -> {uniform: [a, b]}, {log_uniform: [a, b]} or {choice: [...]}.")


class HalvingConfig(Section):
    metric: str | None = Field(
        default=None,
        description="The held-out metric of the task that ranks members at a rung. Default: the task's primary metric.",
    )
    factor: Annotated[float, Field(gt=1)] = Field(default=2.0, description="At each rung, one in `factor` members continues.")
    rungs: PositiveInt | list[PositiveInt] = Field(
        description="Number of rungs, the last at 1 / factor of the steps and each at 1 / factor of the next; or a list of steps."
    )

    @model_validator(mode="after")
    def _rungs(self) -> HalvingConfig:
        if isinstance(self.rungs, list) and (not self.rungs or any(a >= b for a, b in itertools.pairwise(self.rungs))):
            raise ValueError(f"'rungs' must be increasing steps, got {self.rungs}")
        return self


class SweepConfig(Section):
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Dotted config key -> values. Members are all combinations.")
    zip: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Dotted config key -> values that are combined by position: the first of each, the second of each, ...",
    )
    random: RandomConfig | None = Field(default=None, description="Points drawn at random.")
    members: list[dict[str, Any]] = Field(
        default_factory=list, description="Single members, each a mapping of dotted config keys to values."
    )
    seeds: PositiveInt | list[NonNegativeInt] | None = Field(
        default=None, description="Repeat each point with several values of training.seed: a number of seeds, or a list."
    )
    where: str | None = Field(
        default=None,
        description="A condition that members must satisfy, such as: rank <= 8 or targets != 'mlp'. Keys go by their last part.",
    )
    reference: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Swept key -> value. Tables compare each member with the one that has these values and otherwise the same settings. "
            "Default: with the best member."
        ),
    )
    halving: HalvingConfig | None = Field(default=None, description="Successive halving: only the best members of each rung continue.")
    max_pack: PositiveInt = Field(default=16, description="Maximal number of members in one compiled step.")
    max_padding: Fraction = Field(
        default=0.25,
        description=(
            "Maximal fraction of a pack's time, compiling included, spent on padding: ranks above a member's own, sites it does not "
            "adapt, layers below its lowest. Members that differ more train in separate packs."
        ),
    )
    memory_limit: Bytes | None = Field(
        default=None,
        description="Memory limit of a pack on a device: bytes or a size such as 8GB. Default: the device's memory, and no limit on a CPU.",
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
            raise ValueError("has no key to sweep over: give a 'grid', 'zip', 'random', 'members' or 'seeds'")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                "'zip' needs the same number of values for each key, got " + ", ".join(f"{k}: {n}" for k, n in lengths.items())
            )
        parts = [*self.grid, *self.zip, *(self.random.keys if self.random else ()), *(["training.seed"] if self.seeds else ())]
        twice = next((key for key in parts if parts.count(key) > 1), None)
        if twice:
            raise ValueError(f"'{twice}' is swept in two ways")
        return self
