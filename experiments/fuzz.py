"""Does anything but a right result or a clear refusal come of damaged input, and does a run that is ended by force lose anything?

    python experiments/fuzz.py --out experiments/results/fuzz.json
    python experiments/fuzz.py --configs 0 --flips 0 --files 0 --kills 0 --terms 10     one part alone

Five parts, all on a tiny random base:

configs   a config with one to three mutations: it is loaded and planned, or refused.
flips     one flipped bit in a saved adapter (a member's, or one in PEFT's format): it is refused, or loads the same numbers.
files     a damaged data file: its rows become examples, or it is refused.
kills     a sweep is ended by SIGKILL at random moments and resumed until it is done: it has the bits of an undisturbed one.
terms     the same by SIGTERM while it loads, compiles or saves: it exits with 75 each time.

"Refused" is an `InputError`; any other exception, a case that takes longer than its limit, and other bits are faults. Expected: none, in
about 20 minutes on 2 cores. It prints one JSON with counts and versions, and exits with 1 where there is a fault. A fault of the first
three parts names its number; the same seed makes the same case again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees its own folder alone; the tiny models are those of the tests

from experiments.fuzz_inputs import Counts, fuzz_configs, fuzz_files, fuzz_flips  # noqa: E402


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


# Two packs that share their programs; dropout, evaluations and checkpoints in each.
SWEEP: dict[str, Any] = {
    "training.steps": 6,
    "adapter.dropout": 0.2,
    "tracking.checkpoint_every": 2,
    "sweep": {"grid": {"optimizer.learning_rate": [0.01, 0.02], "training.seed": [0, 1]}, "max_pack": 2},
}

# What compiles sooner, alike in all runs, and is found in the cache: the files are what matters here.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}

# Phase -> the function that a SIGTERM comes in, as its caller names it, at which of its calls, and the most seconds after it began.
PHASES = {
    "loading: rows": ("lora_jax.data.sources:read_columns", 1, 0.0),
    "loading: examples": ("lora_jax.training.setup:prepare", 1, 0.05),
    "loading: base": ("lora_jax.training.setup:BaseFiles.load", 1, 0.3),
    "compiling: training": ("lora_jax.parallel.program:Program.prepare", 1, 2.0),
    "compiling: evaluation": ("lora_jax.parallel.program:Program.prepare", 8, 1.0),
    "compiling: tracing": ("lora_jax.training.step:train_step", 1, 0.2),
    "saving: checkpoint": ("lora_jax.training.checkpoint:PackCheckpoints._write", 1, 0.05),
    "saving: best": ("lora_jax.training.checkpoint:PackCheckpoints.save_best", 1, 0.05),
    "saving: adapter": ("lora_jax.packing.recorder:save_adapter", 2, 0.02),
    "saving: plan": ("lora_jax.sweeps.run:keep_plan", 1, 0.0),
}


class Forced:
    """A sweep in processes of its own.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path):
        from tests.tiny_hub import write_hub

        self.folder = folder
        self.config = write_hub(folder / "hub").write(folder, SWEEP)
        began = time.monotonic()
        if self.start("runs", "whole").wait():
            raise RuntimeError("the undisturbed sweep failed")
        self.seconds = time.monotonic() - began
        self.bits = bits_of_run(folder / "runs" / "whole")
        print(f"an undisturbed sweep: {self.seconds:.0f} s", file=sys.stderr)

    def start(self, runs: str, name: str, *signalled: str) -> subprocess.Popen[bytes]:
        """The sweep's command, in a new process.

        Args:
            runs: the folder of run directories, which share a compile cache.
            name: of the run.
            signalled: where it sends itself a SIGTERM: a function, its call, seconds.
        """
        command = [sys.executable, __file__, "--signalled", *signalled] if signalled else [sys.executable, "-m", "lora_jax.cli.main"]
        words = ["sweep", str(self.config), f"name={name}", f"tracking.dir={self.folder / runs}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | QUICK
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=log, env=environment, cwd=self.folder)

    def said(self) -> str:
        """What the newest process wrote last on stderr."""
        return ((self.folder / "log.txt").read_text(errors="replace").strip().splitlines() or [""])[-1][:200]

    def faults(self, run: Path) -> list[str]:
        """What a finished run has that the undisturbed one has not, or otherwise."""
        whole = self.folder / "runs" / "whole"
        files = {p.name for p in whole.iterdir()} ^ {p.name for p in run.iterdir()}
        return [f"{run.name}: {what}" for what in (*differing(self.bits, bits_of_run(run)), *sorted(files))]


def fuzz_kills(forced: Forced, count: int, seed: int) -> Counts:
    """Ends sweeps by SIGKILL at random moments; each is resumed until it is done, and then another begins."""
    moments, faults, runs, killed, takes = random.Random(seed), [], 0, 0, forced.seconds
    while killed < count:
        runs, before = runs + 1, killed
        run = forced.folder / "runs" / f"killed-{runs}"
        code = None
        while code is None:
            process, began = forced.start("runs", run.name), time.monotonic()
            try:  # the first seconds, in which it imports, are of less interest
                code = process.wait(moments.uniform(0.2, 1.0) * takes if killed < count else None)
                if killed == before:  # a whole sweep, by programs of the cache and on a machine that may be less busy now
                    takes = min(takes, time.monotonic() - began)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                print(f"kills: {killed} of {count}, in run {runs}", file=sys.stderr)
        faults += [f"{run.name}: exit code {code}: {forced.said()}"] if code else forced.faults(run)
        shutil.rmtree(run)
    return {"tried": count, "sweeps": runs, "faults": faults}


def fuzz_terms(forced: Forced, count: int, seed: int) -> Counts:
    """Has sweeps send themselves a SIGTERM in one of `PHASES`; each must exit with 75, and be done when the command is given again."""
    moments, faults = random.Random(seed), []
    counts: dict[str, int] = dict.fromkeys(("loading", "compiling", "saving"), 0)
    for number in range(count):
        phase, (function, call, most) = list(PHASES.items())[number % len(PHASES)]
        runs = f"stopped-{number}"  # with a compile cache of its own: in another's nothing is left to compile
        stopped = forced.start(runs, "run", function, str(call), str(moments.uniform(0, most))).wait()
        if stopped != 75:
            faults.append(f"terms {number}, {phase}: exit code {stopped}: {forced.said()}")
        code = forced.start(runs, "run").wait()
        run = forced.folder / runs / "run"
        faults += [f"terms {number}, {phase}: then exit code {code}: {forced.said()}"] if code else forced.faults(run)
        counts[phase.partition(":")[0]] += 1
        print(f"terms: {number + 1} of {count}, {phase}", file=sys.stderr)
        shutil.rmtree(forced.folder / runs)
    return {"tried": count, **counts, "faults": faults}


def run_signalled(function: str, call: str, seconds: str, arguments: list[str]) -> None:
    """`lora-jax ARGUMENTS` in this process, which gets a SIGTERM so many seconds after a call of a function began.

    Args:
        function: `module:name`, or `module:class.name`.
        call: which call of it, from 1.
        seconds: how long after.
        arguments: of the command line.
    """
    from lora_jax.cli import main as cli

    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for word in outer:
        owner = getattr(owner, word)
    original, calls = getattr(owner, name), 0

    def signalled(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call):
            timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()
        return original(*args, **options)

    setattr(owner, name, signalled)
    sys.argv = ["lora-jax", *arguments]
    cli.main()


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may hang on."""
    packages = ("lora-jax", "jax", "flax", "optax", "orbax-checkpoint", "safetensors", "tokenizers", "pyarrow", "pydantic", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--signalled"]:
        function, call, seconds, *arguments = sys.argv[2:]
        run_signalled(function, call, seconds, arguments)
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for part, default in (("configs", 500), ("flips", 400), ("files", 2000), ("kills", 30), ("terms", 10), ("seed", 0)):
        parser.add_argument(f"--{part}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="a file that has the JSON after each part; parts in it that are not run now stay")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    forced: list[Forced] = []

    def once(folder: Path) -> Forced:
        forced.extend([] if forced else [Forced(folder)])
        return forced[0]

    parts: dict[str, Callable[[Path, int, int], Counts]] = {"configs": fuzz_configs, "flips": fuzz_flips, "files": fuzz_files}
    parts["kills"] = lambda folder, count, seed: fuzz_kills(once(folder), count, seed)
    parts["terms"] = lambda folder, count, seed: fuzz_terms(once(folder), count, seed)
    tried = [part for part in parts if getattr(options, part)]
    with tempfile.TemporaryDirectory() as folder:
        for part in tried:
            began, own = time.monotonic(), Path(folder) / ("forced" if part in ("kills", "terms") else part)
            own.mkdir(exist_ok=True)
            counts = parts[part](own, getattr(options, part), options.seed)
            found[part] = {"seed": options.seed, "minutes": round((time.monotonic() - began) / 60, 1), **counts}
            found["versions"] = versions()
            if options.out:
                options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 1 if any(found[part]["faults"] for part in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
