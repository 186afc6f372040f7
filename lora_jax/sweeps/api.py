"""`fit` and `sweep`: training from Python, without a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config.load import load_config, with_values
from ..config.schema import Config
from ..tracking import MemberResult, Progress
from .run import SweepOutcome, run_sweep


def fit(config: Config | str, *, fresh: bool = False, **values: Any) -> MemberResult:
    """Trains one adapter and returns its result. Everything else is in the run directory.

    Args:
        config: a `Config`, or the path of a YAML file.
        fresh: rename an old run directory of this name instead of resuming it.
        values: config keys with `__` for the dot: `adapter__rank=4`.
    """
    loaded = _loaded(config, {k.replace("__", "."): v for k, v in values.items()})
    return run_sweep(loaded.model_copy(update={"sweep": None}), fresh=fresh, progress=Progress()).results[0]


def sweep(
    config: Config | str, grid: Mapping[str, Sequence[Any]] | None = None, *, solo: bool = False, fresh: bool = False
) -> SweepOutcome:
    """Trains all members of a sweep, in packs.

    Args:
        config: a `Config`, or the path of a YAML file.
        grid: dotted config key -> values; replaces the config's `sweep.grid`.
        solo: train each member alone.
        fresh: rename an old run directory of this name instead of resuming it.
    """
    loaded = _loaded(config, {} if grid is None else {"sweep": {"grid": {k: list(v) for k, v in grid.items()}}})
    return run_sweep(loaded, solo=solo, fresh=fresh, progress=Progress())


def _loaded(config: Config | str, values: Mapping[str, Any]) -> Config:
    loaded = load_config(config) if isinstance(config, str) else config
    if "sweep" in values:
        loaded = Config.model_validate(loaded.model_dump() | {"sweep": values["sweep"]})
        values = {k: v for k, v in values.items() if k != "sweep"}
    return with_values(loaded, values, where="fit") if values else loaded
