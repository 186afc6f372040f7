"""Does a sweep that is killed repeatedly end with the bits of an uninterrupted one?

    python experiments/fuzz_kills.py configs/quickstart.yaml training.steps=12 --kills 20 --seed 0

Runs the sweep once to its end. Then runs it again, kills it with `kill -9` at random times (within the duration of the first run), and
resumes it with the same command. Adapters, optimizer state and `results.csv` must be bit-identical. Otherwise the script lists the
differences and exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


def bits_of_run(run: Path) -> dict[str, str]:
    """The results of a finished run: a digest of `results.csv`, of every array of every adapter, and of each pack's newest checkpoint."""
    found = {"results.csv": hashlib.sha256((run / "results.csv").read_bytes()).hexdigest()}
    folders = [p / "arrays" for kind in ("final", "best") for p in run.glob(f"*/{kind}")]
    for pack in (run / "checkpoints").iterdir():
        steps = [int(p.name) for p in pack.iterdir() if p.name.isdecimal()]
        folders.append(pack / str(max(steps)) / "arrays")
    with ocp.StandardCheckpointer() as checkpointer:
        for folder in folders:
            for name, array in checkpointer.restore(folder.resolve()).items():
                value = np.asarray(array)
                digest = hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()
                found[f"{folder.parent.relative_to(run)}: {name}"] = digest
    return found


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """What is not the same in two runs."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _fuzz(Path(folder), options)


def _fuzz(folder: Path, options: Any) -> int:
    def command(name: str) -> list[str]:
        words = [options.config, *options.overrides, "name=fuzz", f"tracking.dir={folder / name}", "tracking.checkpoint_every=1"]
        return [sys.executable, "-m", "lora_jax.cli.main", "sweep", *words]

    began = time.monotonic()
    subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
    takes = time.monotonic() - began
    print(f"left alone: {takes:.0f} s")
    moments = random.Random(options.seed)
    for number in range(1, options.kills + 1):
        seconds = moments.uniform(0, takes)
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        print(f"kill {number}/{options.kills} after {seconds:.2f} s: {'it had ended' if code == 0 else f'exit code {code}'}")
    subprocess.run(command("killed"), check=True, stdout=subprocess.DEVNULL)
    unlike = differing(bits_of_run(folder / "whole" / "fuzz"), bits_of_run(folder / "killed" / "fuzz"))
    print("bit-identical" if not unlike else "\n".join(["different:", *unlike]))
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
