"""`lora-jax doctor CONFIG`: where a config's parameters will lie, and the memory that its largest pack takes; no weights are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec
from rich.table import Table

from ..config.load import load_config
from ..config.schema import Config
from ..config.types import size_text
from ..errors import InputError, RunError
from ..launch.local import virtual_devices
from ..packing.cost import Placement
from ..packing.execution import compile_cache
from ..parallel.mesh import mesh_sizes
from ..parallel.program import memory_limit
from ..sweeps.plan import largest_pack_shapes
from .options import results_console
from .plan import memory_table


def placement_command(config: Path, overrides: list[str]) -> None:
    """Prints the placement and memory of the largest pack of a config.

    A mesh of more devices than this process sees is looked at in a process that sees its CPU as that many.

    Raises:
        InputError: the config, the model, the data or an adapter will not do.
        RunError: that process failed.
    """
    loaded = load_config(config, overrides)
    seen, needed = len(jax.devices()), int(np.prod(mesh_sizes(loaded.mesh, len(jax.devices()))))
    if needed <= seen:
        _print(loaded)
        return
    environment = os.environ | virtual_devices(needed, os.environ)
    child = subprocess.run([sys.executable, "-m", __name__, str(config), *overrides], env=environment, capture_output=True, text=True)
    if child.returncode:
        raise (InputError if child.returncode == 2 else RunError)(child.stderr.strip())
    console = results_console()
    console.print(child.stdout, end="", markup=False)
    console.print(f"[bold red]The mesh needs {needed} devices; this process sees {seen}.[/]")


def _print(config: Config) -> None:
    with compile_cache(config):
        shapes, members = largest_pack_shapes(config)
        memory = shapes.memory(members)
    console = results_console()
    console.print(_parameters(shapes.placements(members), dict(shapes.mesh.shape), members))
    console.print(memory_table(memory, members, "one member" if members == 1 else f"{members} members", memory_limit(config)))


def _parameters(placements: list[Placement], mesh: dict[str, int], count: int) -> Table:
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    members = f"{count} members" if count > 1 else "one member"
    table = Table(title=f"parameters on {shape}, {members}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("parameter", "left"), ("shape", "left"), ("dtype", "left"), ("cut over", "left"), ("a device", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for p in placements:
        trained = " (trained)" if p.trained else ""
        table.add_row(p.name + trained, " x ".join(map(str, p.shape)), p.dtype, _spec(p.spec, mesh), size_text(p.bytes))
    return table


def _spec(spec: PartitionSpec, mesh: dict[str, int]) -> str:
    """Axis by axis, `-` where it is replicated: `- fsdp tensor`. Mesh axes of one device cut nothing."""
    axes = [[part] if isinstance(part, str) else list(part or ()) for part in spec]
    cut = ["+".join(a for a in names if mesh[a] > 1) or "-" for names in axes]
    return "replicated" if set(cut) <= {"-"} else " ".join(cut)


if __name__ == "__main__":
    try:
        _print(load_config(Path(sys.argv[1]), sys.argv[2:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
