"""How much longer does a LoRA step take over a quantised base? SmolLM2-135M, 8 rows of 128 tokens.

    python experiments/benchmarks/quantized_step.py [--bases nf4 int8 q4_1] [--steps N] [--rows N] [--output FILE.json]

The bases take their steps in turn in one process, on the same batch. Each ratio is the median over rounds of a base's seconds to float32's
in the same round, by the clock and by CPU time, which says more on a busy machine. Aim: nf4 in at most 1.5 times float32's time.
Needs the asset packages.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from _sides import cpu_name, warn_if_busy
from quantized_memory import BASES, SOURCE, config_of

AIM, WARM_UP = 1.5, 1


def stepper(base: str, rows: int, members: int) -> Callable[[], None]:
    """A function that takes one step of a pack over the base."""
    import jax
    import numpy as np

    from lora_jax.models.load import load_model
    from lora_jax.packing.pack import Pack
    from lora_jax.training.setup import Preparer

    config = config_of(base, rows)
    setup = Preparer(weights=False)(config)
    held: Any = setup.model
    held.base = load_model(SOURCE, transforms=config.model.transforms, quantized=config.model.quantized)
    pack, batch = Pack.build(held, [config] * members, 1000), setup.plan.batch(0)
    state, number = pack.state, 0

    def step() -> None:
        nonlocal state, number
        state, _ = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(number))
        jax.block_until_ready(state)
        number += 1

    return step


def in_turn(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Median seconds of a step by base, and its ratio to float32's; every other round goes backwards."""
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in steps} for clock in ("wall", "cpu")}
    for number in range(WARM_UP + rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            before = time.perf_counter(), time.process_time()
            steps[name]()
            if number >= WARM_UP:
                seconds["wall"][name].append(time.perf_counter() - before[0])
                seconds["cpu"][name].append(time.process_time() - before[1])
    found: dict[str, Any] = {}
    for clock, own in seconds.items():
        for name, times in own.items():
            ratios = [a / b for a, b in zip(times, own["float32"], strict=True)]
            facts = {"seconds": round(median(times), 3), "ratio": round(median(ratios), 3)}
            facts |= {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}
            found.setdefault(name, {})[clock] = facts
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=[name for name in BASES if name != "float32"], default=["nf4", "int8", "q4_1"])
    parser.add_argument("--steps", type=int, default=7, help="of each base that count")
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens in a batch")
    parser.add_argument("--members", type=int, default=1, help="of the pack")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    load = warn_if_busy()
    steps = {name: stepper(name, options.rows, options.members) for name in ("float32", *options.bases)}
    found = in_turn(steps, options.steps)
    for name, facts in found.items():
        print(f"{name}: " + "; ".join(f"{clock} {own['seconds']} s, {own['ratio']} of float32" for clock, own in facts.items()))
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/quantized_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": cpu_name(),
        "load": round(load, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "aim": AIM,
        "bases": found,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
