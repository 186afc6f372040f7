"""One side of a benchmark in its own process, controlled by lines of JSON. Both sides stay alive and alternate."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


class Side:
    """A process that answers each line with one of JSON.

    Args:
        name: the side's name.
        arguments: arguments of Python: a script and its arguments. The script prints a first line when it is ready.

    Attributes:
        ready: that first line.
    """

    def __init__(self, name: str, arguments: Sequence[str]):
        environment = side_environment()
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # on a GPU: leave room for the other side, and count what is used
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended (exit code {self.process.wait()}); its message is above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def side_environment() -> dict[str, str]:
    """Of any side: this tree, nothing compiled before, no network."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | _QUIET | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a first run compiles
    return environment


def cpu_name() -> str:
    """The CPU's model, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def warn_if_busy() -> float:
    """The load average; says so where others use the machine."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.5 * cores:
        print(f"warning: the machine is busy (load {load:.1f} on {cores} cores); PyTorch's threads wait for each other and lose most")
    return load
