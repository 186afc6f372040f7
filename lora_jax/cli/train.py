"""`lora-jax train`: one adapter."""

from __future__ import annotations

from pathlib import Path

from ..config.load import load_config
from ..errors import InputError
from ..parallel.processes import Joining
from .sweep import run_and_report


def train_command(config: Path, overrides: list[str], *, fresh: bool, joining: Joining) -> None:
    """Trains the one member of a config without a sweep, in this process or as one of several."""
    loaded = load_config(config, overrides)
    if loaded.sweep is not None:
        raise InputError(f"{config}: has a 'sweep'; run it with: lora-jax sweep {config} (or override it: sweep=null).")
    run_and_report(loaded, solo=True, fresh=fresh, joining=joining)
