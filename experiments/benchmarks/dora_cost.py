"""What DoRA costs beside LoRA: time a step and memory, in a pack of 8 on MiniLM, and in PEFT.

    python experiments/benchmarks/dora_cost.py [--members K] [--rank R] [--targets attention|mlp] [--steps N] [--output FILE.json]

The two methods take their steps in turn in one process, on the same batch of film reviews; so do PEFT's LoRA and DoRA in another process.
Each ratio is the median over pairs of steps that follow each other, by the clock and by CPU time, which says more on a busy machine.
Memory is what XLA plans for the compiled step beside its arguments (`memory_analysis`), members side by side and one after the other.
Aims: at most 1.35 times LoRA's time; no array of a weight's size for each member. Needs the `[interop]` extra and the asset packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from _sides import cpu_name, side_environment, warn_if_busy
from _vs_peft_cases import CASES, Case, prepare

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "dora")
# Names mean the same to both sides, and the weights that they name: (inputs, outputs).
TARGETS = {
    "attention": (["query", "key", "value", "attention.output.dense"], [(384, 384)]),
    "mlp": (["intermediate.dense", "output.dense"], [(384, 1536), (1536, 384)]),
}
AIM, WARM_UP = 1.35, 2


def case_of(method: str, rank: int, targets: str) -> Case:
    """The film reviews of `vs_peft.py`, by one of the methods."""
    adapter = {"method": method, "rank": rank, "alpha": 16, "targets": TARGETS[targets][0]}
    return dataclasses.replace(CASES["minilm"], config=CASES["minilm"].config | {"adapter": adapter})


def in_turn(steps: dict[str, Callable[[], None]], count: int) -> dict[str, Any]:
    """Each method's median seconds a step, and DoRA's over LoRA's; the first of a pair alternates."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + count):
        for name in METHODS if number % 2 else METHODS[::-1]:
            before = time.perf_counter(), time.process_time()
            steps[name]()
            wall[name].append(time.perf_counter() - before[0])
            cpu[name].append(time.process_time() - before[1])
    found: dict[str, Any] = {}
    for what, seconds in (("seconds", wall), ("cpu_seconds", cpu)):
        kept = {name: values[WARM_UP:] for name, values in seconds.items()}
        found[what] = {name: round(median(values), 4) for name, values in kept.items()}
        pairs = [d / l for l, d in zip(*(kept[name] for name in METHODS), strict=True)]
        found[f"{what}_ratio"] = {"median": round(median(pairs), 3), "lowest": round(min(pairs), 3), "highest": round(max(pairs), 3)}
    return found


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Packs of equal members."""
    import jax
    import numpy as np

    from lora_jax.config.schema import Config
    from lora_jax.packing.execution import SCAN, VMAP
    from lora_jax.packing.pack import Pack
    from lora_jax.training.setup import set_up

    config = {m: Config.model_validate(case_of(m, options.rank, options.targets).full_config(100)) for m in METHODS}
    setup = set_up(config["lora"])
    inputs = setup.step_inputs(0, setup.plan.batch(0), None)
    weights = TARGETS[options.targets][1]
    memory: dict[str, Any] = {"weight_bytes": max(4 * i * o for i, o in weights)}
    steps: dict[str, Callable[[], None]] = {}

    def stepping(pack: Pack, compiled: Any) -> Callable[[], None]:
        state = [pack.state]

        def step() -> None:
            state[0], _ = jax.block_until_ready(compiled(state[0], pack.fixed, pack.part.frozen, inputs, np.int32(0)))

        return step

    for mode in (VMAP, SCAN):
        temporaries, of_members = {}, {}
        for method in METHODS:
            pack = Pack.build(setup.model, [config[method]] * options.members, setup.steps, setup.mesh, mode)
            compiled = pack.programs.train.lower(pack.state, pack.fixed, pack.part.frozen, inputs, np.int32(0)).compile()
            temporaries[method] = compiled.memory_analysis().temp_size_in_bytes
            shapes = "|".join(f"{options.members},(?:{i},{o}|{o},{i})" for i, o in weights)
            of_members[method] = len(re.findall(rf"= f32\[(?:{shapes})\]", compiled.as_text()))
            if mode is VMAP:
                steps[method] = stepping(pack, compiled)
        more = temporaries["dora"] - temporaries["lora"]
        memory[mode.name] = {"temporary_bytes": temporaries, "more": more, "weight_sized_arrays_of_members": of_members}
    tokens = int(inputs["tokens"].size)
    memory["activation_bytes"] = 4 * options.members * tokens * max(o for _, o in weights)  # one site's output, of all members
    return {"tokens": tokens, "memory": memory, **in_turn(steps, options.steps)}


def pefts(options: argparse.Namespace) -> dict[str, Any]:
    """One PyTorch model for each method, on one batch."""
    from _vs_peft_worker import Peft

    sides = {m: Peft(case_of(m, options.rank, options.targets), Path(options.folder), 1000) for m in METHODS}
    batch = next(sides["lora"].batches)
    for side in sides.values():
        side.batches = itertools.repeat(batch)
    steps = {m: lambda side=side: (side.train(1), None)[1] for m, side in sides.items()}
    times = in_turn(steps, options.steps)
    return {"tokens": int(batch["input_ids"].numel()), "threads": sides["lora"].facts()["threads"], **times}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each method (default 15)")
    parser.add_argument("--output", type=Path, help="JSON file; by default results/dora_cost_cpu.json beside this file")
    parser.add_argument("--here", choices=["lora-jax", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps((ours if options.here == "lora-jax" else pefts)(options)))
        return
    given = sys.argv[1:] if argv is None else list(argv)
    load = warn_if_busy()
    sides = {}
    with tempfile.TemporaryDirectory(prefix="dora_cost-") as folder:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, case_of("lora", options.rank, options.targets), folder).result()
        for side in ("lora-jax", "peft"):
            command = [sys.executable, __file__, *given, "--here", side, "--folder", folder]
            done = subprocess.run(command, env=side_environment(), stdout=subprocess.PIPE, text=True, check=True)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, {k: v for k, v in sides[side].items() if k.endswith("ratio")}, flush=True)
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/dora_cost.py", *given]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name(),
        "load_average": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers", "peft")},
        "members": options.members,
        "aim": AIM,
        **sides,
    }
    output = options.output or HERE / "results" / "dora_cost_cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
