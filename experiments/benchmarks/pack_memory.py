"""Does a pack take as much memory as its plan says? Packs of 1, 4 and 16 members, each trained in its own process.

    python experiments/benchmarks/pack_memory.py [--model minilm|smollm2] [--members K ...] [--output FILE.json]

Every process loads the base, builds and compiles a pack of K members, records its memory, then trains some steps and evaluates. The pack's
own memory plus the peak growth is compared with the planner's estimate (without the base) and with XLA's for the compiled program.
`sweep.memory_limit` is set: packs without a limit keep some more memory, and are faster.
Runs only on Linux, where a process's peak can be read and reset, and on CPUs, where a process's memory is the device's.
Needs the asset packages.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _sides import cpu_name, side_environment
from _vs_peft_cases import CASES

STEPS = 4
LIMIT = "16GB"  # with one, what is freed goes back to the system at once


def status(name: str) -> int:
    """Bytes that `/proc/self/status` tells: `VmRSS` now, `VmHWM` at the most since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(model: str, members: int) -> dict[str, int]:
    """Trains a pack here; bytes by the planner, by XLA, and by what this process came to hold."""
    import jax
    import numpy as np

    from lora_jax.config.schema import Config
    from lora_jax.packing.cost import PackShapes
    from lora_jax.packing.pack import Pack
    from lora_jax.parallel.program import program_bytes, release_freed_memory
    from lora_jax.training.setup import set_up

    case = CASES[model].full_config(STEPS)
    sweep = {"members": [{}], "memory_limit": LIMIT}
    config = Config.model_validate(case | {"task": case["task"] | {"eval_size": 256}, "sweep": sweep})
    setup = set_up(config)
    told = PackShapes(setup, [config]).memory_line(16).at(members)
    jax.clear_caches()
    release_freed_memory()
    pack = Pack.build(setup.model, [config] * members, setup.steps, setup.mesh)
    inputs = setup.step_inputs(0, setup.plan.batch(0), None)
    held_out = setup.held_out_inputs(setup.plan.eval_batches()[0], None)
    arguments = (pack.fixed, pack.part.frozen, inputs, np.int32(0))
    compiled = pack.programs.train.lower(pack.state, *arguments).compile()
    pack.programs.train.prepare(pack.state, *arguments)
    pack.programs.evaluate.prepare(pack.state.trainable, pack.fixed.settings, pack.part.frozen, held_out)
    built = status("VmRSS")
    best = jax.tree.map(lambda a: a.copy(), pack.state.trainable)  # as the loop keeps them
    Path("/proc/self/clear_refs").write_text("5")
    state = pack.state
    for step in range(STEPS):
        state, _ = pack.programs.train(
            state, pack.fixed, pack.part.frozen, setup.step_inputs(step, setup.plan.batch(step), None), np.int32(step)
        )
        jax.block_until_ready(state)
    jax.block_until_ready(pack.programs.evaluate(state.trainable, pack.fixed.settings, pack.part.frozen, held_out))
    peak = status("VmHWM")
    trained = sum(a.nbytes for a in jax.tree.leaves(best))
    held = sum(a.nbytes for a in jax.tree.leaves((pack.fixed, state)))  # built before, beside what compiling left
    return {
        "forecast_total": told.total,
        "forecast_base": told.base,
        "forecast_beside_base": told.total - told.base,
        "compiled_beside_base": (program_bytes(compiled) or 0) - told.base + trained,
        "process_beside_base": peak - built + held,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(CASES), default="minilm")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options.model, options.here)))
        return
    found: dict[str, Any] = {}
    for members in options.members:
        command = [sys.executable, __file__, "--model", options.model, "--here", str(members)]
        done = subprocess.run(command, env=side_environment(), stdout=subprocess.PIPE, text=True, check=True)
        found[str(members)] = facts = json.loads(done.stdout.splitlines()[-1])
        print(members, {k: f"{v / 1e6:,.0f} MB" for k, v in facts.items()}, flush=True)
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/pack_memory.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": cpu_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib")},
        "members": found,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
