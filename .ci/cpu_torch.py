"""Install the pinned PyTorch for the interop tests, and refuse a CUDA build: it would bring gigabytes that no test uses.

Run by `make test-interop` with the environment's own Python: `python .ci/cpu_torch.py torch==2.13.0`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys


def pip(*arguments: str, capture: bool = False) -> str:
    """Run this environment's pip; its errors go to the terminal."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None).stdout


def main(requirement: str) -> int:
    name, _, version = requirement.partition("==")
    try:
        if importlib.metadata.version(name).split("+")[0] == version:
            return 0
    except importlib.metadata.PackageNotFoundError:
        pass
    # Which build would be taken? A dry run reads its metadata without installing it.
    report = json.loads(pip("--dry-run", "--no-deps", "--ignore-installed", "--report", "-", requirement, capture=True))
    needs = report["install"][0]["metadata"].get("requires_dist", [])
    if any(_wanted_here(need) for need in needs if need.startswith(("nvidia-", "cuda-", "triton"))):
        print(
            f"error: only a CUDA build of {requirement} is offered for Python {sys.version_info.major}.{sys.version_info.minor}.\n"
            "       The interop tests want the CPU build: use a Python for which there is one (make PYTHON=python3.11),\n"
            "       or put its wheel in a folder and name that: PIP_FIND_LINKS=folder make test-interop",
            file=sys.stderr,
        )
        return 2
    pip(requirement)
    return 0


def _wanted_here(need: str) -> bool:
    """Whether this requirement applies on this platform (torch's markers name the ones with CUDA)."""
    from pip._vendor.packaging.requirements import Requirement  # pip is the one package every environment has

    marker = Requirement(need).marker
    return marker is None or marker.evaluate({"extra": ""})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
