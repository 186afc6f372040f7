"""What a run ran on, so that its figures can be read later. No host name, user name or home folder is recorded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    "lora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers", "transformers", "tensorboardX",
)  # fmt: skip


def describe_environment(devices: Sequence[Any] | None = None, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Describes this process's software and hardware as plain JSON values.

    Args:
        devices: JAX devices (anything with `platform` and `device_kind`); by default `jax.devices()`, which starts the backend.
        argv: The command line; by default this process's. Of its first word only the file name is kept.
    """
    if devices is None:
        import jax  # not at the top: reading results needs no JAX

        devices = jax.devices()
    argv = list(sys.argv if argv is None else argv)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(argv[0]).name, *argv[1:]] if argv else [],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "backend": devices[0].platform if devices else None,
        "devices": {"kind": devices[0].device_kind if devices else None, "count": len(devices)},
        "packages": _versions(),
        "git": _git(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git() -> dict[str, Any] | None:
    """Commit of the working folder's repository and whether tracked files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
