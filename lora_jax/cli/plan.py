"""What a config needs, before anything is trained: `sweep --plan` (packs, memory, time) and `doctor CONFIG` (placement, memory)."""

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
from ..packing.cost import PackMemory, Placement
from ..packing.execution import compile_cache, configured_mode, why_scanned
from ..packing.planner import Part
from ..parallel.mesh import mesh_sizes
from ..parallel.program import memory_limit
from ..sweeps.plan import Estimate, estimate, largest_pack_shapes
from .options import results_console

_NAMES = 20
_VIRTUAL = 1024  # devices that a CPU is seen as: each takes threads and memory


def plan_command(config: Config, *, solo: bool, fresh: bool, many: bool, part: Part | None) -> None:
    """Prints what `lora-jax sweep` with the same arguments would do."""
    found = estimate(config, solo=solo, fresh=fresh, many=many, part=part)
    console = results_console()
    for line in _heading(config, found):
        console.print(line)
    if not found.packs:
        return
    console.print(_packs(found))
    for line in dict.fromkeys(why_scanned(p.plan.members[0].config) for p in found.packs if len(p.plan.members) > 1):
        if line is not None:
            console.print(line)
    for number, pack in enumerate(found.packs, 1):
        names = [m.name for m in pack.plan.members]
        more = [f"and {len(names) - _NAMES} more"] if len(names) > _NAMES else []
        console.print(f"pack {number}: " + "  ".join(names[:_NAMES] + more))
    largest = max(found.packs, key=lambda p: p.memory.total)
    console.print(memory_table(largest.memory, len(largest.plan.members), "largest pack", found.limit))
    for line in _unchosen(config, len(largest.plan.members)):
        console.print(line)
    for line in _estimate(found):
        console.print(line)


def _heading(config: Config, found: Estimate) -> list[str]:
    packs = f"packs to train: {len(found.packs)}, training programs: {found.programs}"
    lines = [f"{config.name}: {found.members} members, {found.ended} of them done; {packs}"]
    if found.fraction < 1:
        lines.append(f"successive halving: {100 * found.fraction:.0f} % of all members' steps; the packs are those up to the first rung")
    return lines


def _packs(found: Estimate) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("pack", "members", "steps", "padding", "memory", "FLOPs per step", "FLOPs", "time"):
        table.add_column(name, justify="right")
    for number, pack in enumerate(found.packs, 1):
        over = found.limit is not None and pack.memory.total > found.limit
        memory = size_text(pack.memory.total) + (" over the limit" if over else "")
        counts = [str(number), str(len(pack.plan.members)), str(pack.steps), f"{100 * pack.padding:.0f} %"]
        table.add_row(*counts, memory, _number(pack.step_flops), _number(found.fraction * pack.flops), _time(pack.seconds(found.fraction)))
    return table


def memory_table(memory: PackMemory, members: int, title: str, limit: int | None) -> Table:
    """The memory of a pack of so many members on one device."""
    table = Table(title=f"memory per device, {title}", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("base, once", size_text(memory.base))
    table.add_row("batch, and what is computed from it once", size_text(memory.shared))
    table.add_row(f"trained state, {members} x {size_text(memory.state // members)}", size_text(memory.state))
    table.add_row(f"activations, {members} x {size_text(memory.activations // members)}", size_text(memory.activations))
    table.add_row("total", size_text(memory.total), style="bold")
    table.add_row("limit", "none (sweep.memory_limit sets one)" if limit is None else size_text(limit))
    return table


def _unchosen(config: Config, members: int) -> list[str]:
    """A note that the memory shown is an upper bound, if the mode in which members run is not chosen yet."""
    if members == 1 or configured_mode(config) is not None:
        return []
    return ["training.pack: auto chooses how members run when training starts. The memory above is an upper bound, that of vmap."]


def _estimate(found: Estimate) -> list[str]:
    rows, width, hidden = found.product
    compiling = sum(p.compiling or 0.0 for p in found.packs)
    many = f", x {found.devices} devices" if found.devices > 1 else ""
    return [
        f"total: {_number(found.flops)} FLOPs (matrix products of training and evaluation, counted), about {_time(found.seconds)}",
        f"The time is an estimate: {_time(compiling)} of compiling, plus the FLOPs at {_number(found.rate)}FLOP/s{many}. Both are measured "
        f"just now, the rate on products of {rows} x {width} by {width} x {hidden} matrices. The rest of a step is not included.",
    ]


def _number(value: float) -> str:
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def placement_command(config: Path, overrides: list[str]) -> None:
    """Prints the placement and memory of the largest pack of a config.

    If the mesh has more devices than this process sees, a child process with that many virtual CPU devices does it.

    Raises:
        InputError: the config, the model, the data or an adapter is not valid.
        RunError: that process failed.
    """
    loaded = load_config(config, overrides)
    seen, needed = len(jax.devices()), int(np.prod(mesh_sizes(loaded.mesh, len(jax.devices()))))
    if needed <= seen:
        _print(loaded)
        return
    if needed > _VIRTUAL:
        raise InputError(f"mesh: needs {needed:,} devices; doctor lays out at most {_VIRTUAL:,}.")
    environment = os.environ | virtual_devices(needed, os.environ)
    child = subprocess.run([sys.executable, "-m", __name__, str(config), *overrides], env=environment, capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines()
        if child.returncode == 2:
            raise InputError("\n".join(said))
        why = said[-1] if said else f"it ended with exit code {child.returncode}"
        raise RunError(f"the process that lays out a mesh of {needed} devices failed: {why}")
    console = results_console()
    console.print(child.stdout, end="")
    console.print(f"The mesh needs {needed} devices; this process sees {seen}.", style="bold red")


def _print(config: Config) -> None:
    with compile_cache(config):
        shapes, members, memory = largest_pack_shapes(config)
    console = results_console()
    console.print(_parameters(shapes.placements(members), dict(shapes.mesh.shape), members))
    console.print(memory_table(memory, members, "one member" if members == 1 else f"{members} members", memory_limit(config)))
    for line in _unchosen(config, members):
        console.print(line)


def _parameters(placements: list[Placement], mesh: dict[str, int], count: int) -> Table:
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    members = f"{count} members" if count > 1 else "one member"
    table = Table(title=f"parameters on {shape}, {members}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("parameter", "left"), ("shape", "left"), ("dtype", "left"), ("sharding", "left"), ("per device", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for p in placements:
        trained = " (trained)" if p.trained else ""
        table.add_row(p.name + trained, " x ".join(map(str, p.shape)), p.dtype, _spec(p.spec, mesh), size_text(p.bytes))
    return table


def _spec(spec: PartitionSpec, mesh: dict[str, int]) -> str:
    """Axis by axis, `-` where it is replicated: `- fsdp tensor`. Mesh axes of one device do not count."""
    axes = [[part] if isinstance(part, str) else list(part or ()) for part in spec]
    cut = ["+".join(a for a in names if mesh[a] > 1) or "-" for names in axes]
    return "replicated" if set(cut) <= {"-"} else " ".join(cut)


if __name__ == "__main__":
    try:
        _print(load_config(Path(sys.argv[1]), sys.argv[2:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
