"""How much memory does a text file of many lines take, and what does a second run of it wait for?

    PYTHONPATH=. python experiments/benchmarks/data_at_size.py [--lines 2000000] [--output FILE.json]

A file of random words is made, and a small model trains on it for some steps: twice, each time in a process of its own. The second run
finds the tokens of the first. Memory is the process's peak (VmHWM: Linux alone), mapped files that it has touched among it; `base` is the
same run on a file of 2,000 lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS = 5


def train(folder: Path, source: str) -> dict[str, float]:
    """Trains here; seconds before and with training, and the peak of this process in bytes."""
    from lora_jax.config.schema import Config
    from lora_jax.sweeps.run import run_sweep
    from lora_jax.training.setup import set_up

    raw = {
        "name": f"run{time.time_ns()}",
        "model": {"source": str(folder / "hub" / "llama")},
        "task": {"kind": "causal_lm", "source": source, "text": "text", "max_length": 32, "eval_size": 200},
        "training": {"steps": STEPS, "batch_size": 16},
        "adapter": {"targets": "all-linear"},
        "tracking": {"dir": str(folder / "runs"), "tensorboard": False},
    }
    config = Config.model_validate(raw)
    began = time.perf_counter()
    set_up(config)
    ready = time.perf_counter() - began
    run_sweep(config)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"setup_seconds": round(ready, 1), "seconds": round(time.perf_counter() - began, 1), "peak_bytes": peak}


def write(path: Path, lines: int) -> None:
    """A file of random words, a hundred thousand lines at a time."""
    from tests.tiny_hub import WORDS

    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, lines, 100_000):
            count = min(100_000, lines - start)
            drawn, lengths = rng.choice(WORDS, (count, 14)), rng.integers(4, 15, count)
            file.writelines(" ".join(row[:n]) + "\n" for row, n in zip(drawn.tolist(), lengths.tolist(), strict=True))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(train(Path(given.worker[0]), given.worker[1])))
        return
    from lora_jax.tracking.rundir import describe_environment
    from tests.tiny_hub import write_hub

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hub").mkdir()
        write_hub(folder / "hub")
        write(folder / "lines.txt", given.lines)
        write(folder / "few.txt", 2000)
        found: dict[str, object] = {"lines": given.lines, "file_bytes": (folder / "lines.txt").stat().st_size, "steps": STEPS}
        for which, file in (("base", "few.txt"), ("first", "lines.txt"), ("second", "lines.txt")):
            command = [sys.executable, __file__, "--worker", name, str(folder / file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[which] = json.loads(done.stdout.strip().splitlines()[-1])
            print(which, found[which], flush=True)
        found["kept_bytes"] = sum(f.stat().st_size for f in (folder / "runs" / ".token-cache").rglob("*.npy"))
    found["environment"] = describe_environment()
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
