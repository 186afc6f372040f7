"""`lora-jax doctor CONFIG`: where a config's parameters will lie, and the memory they will take; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import PartitionSpec
from rich.table import Table

from ..config.load import load_config
from ..packing.forecast import Forecast, forecast
from ..packing.planner import plan_packs
from ..sweeps.space import members_of
from .options import results_console


def placement_command(config: Path, overrides: list[str]) -> None:
    """Prints the placement and expected memory of the largest pack of a config."""
    loaded = load_config(config, overrides)
    packs = plan_packs(members_of(loaded), largest=1 if loaded.sweep is None else loaded.sweep.max_pack)
    largest = max(packs, key=lambda pack: len(pack.members))
    told = forecast([m.config for m in largest.members], len(jax.devices()))
    console = results_console()
    console.print(_parameters(told))
    console.print(_memory(told))
    if told.devices > len(jax.devices()):
        console.print(f"[bold red]The mesh needs {told.devices} devices; this process sees {len(jax.devices())}.[/]")


def _parameters(told: Forecast) -> Table:
    shape = " x ".join(f"{axis} {size}" for axis, size in told.mesh.items() if size > 1) or "one device"
    members = f"{told.members} members" if told.members > 1 else "one member"
    table = Table(title=f"parameters on {shape}, {members}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("parameter", "left"), ("shape", "left"), ("dtype", "left"), ("cut over", "left"), ("a device", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for p in told.placements:
        trained = " (trained)" if p.trained else ""
        table.add_row(p.name + trained, " x ".join(map(str, p.shape)), p.dtype, _spec(p.spec, told.mesh), _size(p.bytes))
    return table


def _spec(spec: PartitionSpec, mesh: dict[str, int]) -> str:
    """Axis by axis, `-` for whole: `- fsdp tensor`. Mesh axes of one device cut nothing."""
    axes = [[part] if isinstance(part, str) else list(part or ()) for part in spec]
    cut = ["+".join(a for a in names if mesh[a] > 1) or "-" for names in axes]
    return "whole" if set(cut) <= {"-"} else " ".join(cut)


def _memory(told: Forecast) -> Table:
    table = Table(title="expected memory of a device", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, size in told.memory.items():
        table.add_row(name, _size(size))
    table.add_row("together, about", _size(told.total), style="bold")
    return table


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
