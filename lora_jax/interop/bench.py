"""What an export takes: its size, the time to load and to call it, and the memory of a process that does nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.doors import EXPORTERS
from ..errors import InputError, RunError, nearest
from .export import Exporter, Runtime

_PACKAGE = Path(__file__).parents[1]
_SCRIPTS = _PACKAGE / "interop" / "runtimes"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One export.

    Attributes:
        path: what was asked for.
        form: name of the exporter.
        runtime: what ran it.
        size_bytes: of all files of the export but its card and tokenizer.
        batch, length, repeats: rows, tokens a row (of models of texts), and calls after the first.
        import_s: until the runtime's packages are imported.
        load_s: from there until the export can be called.
        first_s: the first call, whose shapes a compiling runtime compiles for.
        median_s, fastest_s, slowest_s: the calls after it.
        peak_bytes: the most memory the process had in use.
    """

    path: str
    form: str
    runtime: str
    size_bytes: int
    batch: int
    length: int
    repeats: int
    import_s: float
    load_s: float
    first_s: float
    median_s: float
    fastest_s: float
    slowest_s: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return dataclasses.asdict(self)


def runnable(path: Path) -> tuple[str, Runtime, Path]:
    """The exporter whose export is at a path, what runs it, and the export's main file.

    Args:
        path: a folder that an exporter wrote, or the file in it.

    Raises:
        InputError: nothing is there, or nothing that runs by itself.
    """
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder." + (f" Nearby: {', '.join(near)}." if near else ""))
    runtimes: Mapping[str, Exporter] = EXPORTERS.all()
    found = [(name, exporter.runtime) for name, exporter in runtimes.items() if exporter.runtime is not None]
    for name, runtime in found:
        if path.is_dir() and (path / runtime.file).is_file():
            return name, runtime, path / runtime.file
        if path.is_file() and path.name == runtime.file:
            return name, runtime, path
    for name, runtime in found:  # a file may be called otherwise than it was written
        if path.is_file() and path.suffix == Path(runtime.file).suffix != ".json":
            return name, runtime, path
    wanted = ", ".join(f"{runtime.file} ({name})" for name, runtime in found)
    adapter = " An adapter alone runs only on its base." if path.is_dir() and any(path.glob("adapter*")) else ""
    raise InputError(f"{path}: no export that runs by itself: none of {wanted}.{adapter}")


def measure(path: Path, *, batch: int = 1, length: int = 128, repeats: int = 20) -> Measured:
    """Runs an export in a fresh process.

    Args:
        path: a folder that an exporter wrote, or the file in it.
        batch: rows of a call.
        length: tokens of a row; models of images take no notice.
        repeats: calls after the first.

    Raises:
        InputError: there is no export that runs by itself.
        RunError: it failed; the message has the last line of what the process said.
    """
    form, runtime, file = runnable(path)
    script = _SCRIPTS / runtime.script
    arguments = [str(_SCRIPTS / "measure.py"), str(script), str(file.resolve()), *map(str, (batch, length, repeats))]
    roots = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line and not line[0].isspace()), "it said nothing")
        missing = " pip install 'lora-jax[onnx]'." if "No module named" in last else ""
        raise RunError(f"{path}: {runtime.name} failed: {last}{missing}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(str(path), form, runtime.name, _size(file), batch, length, repeats, **result)


def _size(file: Path) -> int:
    """Bytes of what is needed to run: the file, and the weights and programs beside it."""
    if file.suffix in (".gguf", ".onnx"):
        return sum(part.stat().st_size for part in {file, *file.parent.glob(f"{file.name}.*")})
    kinds = ("*.safetensors", "*.stablehlo", file.name)
    return sum(part.stat().st_size for part in {part for kind in kinds for part in file.parent.glob(kind)})


def bench_rows(measured: Sequence[Measured]) -> list[dict[str, str]]:
    """Rows of a table, in people's units."""
    return [
        {
            "export": one.path,
            "format": one.form,
            "runtime": one.runtime,
            "size": f"{one.size_bytes / 1e6:.1f} MB",
            "load": f"{one.load_s:.2f} s",
            "first call": f"{one.first_s:.2f} s",
            "latency": f"{one.median_s * 1e3:.1f} ms",
            "peak memory": f"{one.peak_bytes / 1e6:.0f} MB",
        }
        for one in measured
    ]
