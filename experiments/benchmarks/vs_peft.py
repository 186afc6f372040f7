"""Training speed and memory compared with Hugging Face PEFT on PyTorch: same machine, data, model, adapter and optimizer.

    python experiments/benchmarks/vs_peft.py [--case minilm|smollm2|all] [--steps N] [--rounds N] [--output FILE.json]

Needs the `[interop]` extra and the asset packages. Each side runs in its own process. Both stay alive, and rounds of N optimizer
steps alternate, as does the side that starts a pair, so that other load on the machine slows both. Useful tokens are those of the text,
without padding. PEFT runs in the usual way: shuffled batches, each padded to its longest example. lora-jax runs through its own path,
from the config on. Both sides use a GPU if there is one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from _sides import Side, cpu_name, warn_if_busy
from _vs_peft_cases import CASES, prepare

HERE = Path(__file__).resolve().parent
SIDES = ("lora-jax", "peft")
# What we aim for: useful tokens a second over PEFT's, and peak memory over PEFT's.
TARGETS = {"minilm": {"speed": 1.5, "memory": 0.75}, "smollm2": {"speed": 1.2, "memory": 0.75}}


def race(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Runs one case; returns all its figures."""
    load = warn_if_busy()
    with tempfile.TemporaryDirectory(prefix="vs_peft-") as folder:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, CASES[name], folder).result()
        script = str(HERE / "_vs_peft_worker.py")
        arguments = {side: [script, side, name, folder, str(steps * (rounds + 1) + 1)] for side in SIDES}
        sides, ratio = alternate(name, arguments, steps, rounds)
    return {"config": CASES[name].config, "load_average": round(load, 2), **sides, "ratios": ratio, "targets": TARGETS[name]}


def alternate(name: str, arguments: Mapping[str, list[str]], steps: int, rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Starts a process for each side and lets them train in turn; returns each side's figures, and the ratios.

    Args:
        name: of the case, for what is printed.
        arguments: Python's arguments of each side, which serves as `_vs_peft_worker.serve` does; the time of its start is added.
        steps: optimizer steps of a round. One round more is trained first.
        rounds: of each side.
    """
    workers: list[Side] = []
    try:
        for side, own in arguments.items():  # one after the other, so that neither start disturbs the other's
            workers.append(Side(side, [*own, str(time.time())]))
        for worker in workers:
            worker.ask(f"train {steps}")  # a warm-up: PyTorch meets most of its batch shapes
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments}
        for number in range(rounds):
            for worker in workers if number % 2 == 0 else reversed(workers):
                results[worker.name].append(worker.ask(f"train {steps}"))
            rates = {side: results[side][-1]["tokens"] / results[side][-1]["seconds"] for side in arguments}
            print(f"{name} round {number + 1}/{rounds}: " + ", ".join(f"{s} {r:,.0f} tokens/s" for s, r in rates.items()), flush=True)
        facts = {worker.name: worker.ask("finish") for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    sides = {worker.name: figures(worker.ready, results[worker.name], facts[worker.name]) for worker in workers}
    return sides, ratios(sides)


def figures(start: dict[str, Any], rounds: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """One side's figures. `cores` is CPU time over wall time within its rounds; `idle_cpu_seconds` what it burned between them.

    Tokens by CPU second say the most on a busy machine, on one core (`taskset -c 0 python ...`) above all.
    """
    rates = [r["tokens"] / r["seconds"] for r in rounds]
    return {
        "tokens_per_second": round(median(rates), 1),
        "seconds_per_round": round(median(r["seconds"] for r in rounds), 3),
        "tokens_per_cpu_second": round(sum(r["tokens"] for r in rounds) / sum(r["cpu_seconds"] for r in rounds), 1),
        "set_up_seconds": round(start["set_up_seconds"], 2),
        "set_up_peak_host_bytes": start["set_up_peak_host_bytes"],
        "first_step_seconds": round(start["first_step_seconds"], 2),
        "cores": round(sum(r["cpu_seconds"] for r in rounds) / sum(r["seconds"] for r in rounds), 2),
        "idle_cpu_seconds": round(sum(r["idle_cpu_seconds"] for r in rounds), 2),
        **facts,
        "rounds": [round(rate, 1) for rate in rates],
    }


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over PEFT's: the median of the rounds' speed ratios with its range, peak memory, time to the first step."""
    ours, theirs = (sides[side] for side in SIDES)
    speeds = [a / b for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)]
    memory = "peak_device_bytes" if theirs["peak_device_bytes"] else "peak_host_bytes"
    return {
        "speed": round(median(speeds), 3),
        "speed_lowest": round(min(speeds), 3),
        "speed_highest": round(max(speeds), 3),
        "speed_by_cpu_time": round(ours["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"], 3),
        "memory": round(ours[memory] / theirs[memory], 3),
        "first_step": round(ours["first_step_seconds"] / theirs["first_step_seconds"], 3),
    }


def device_name(cases: dict[str, dict[str, Any]]) -> str:
    """The GPU that PyTorch used, else the CPU's model."""
    kind = next(iter(cases.values()))["peft"]["device"]
    return cpu_name() if kind == "cpu" else kind


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a case as a small table."""
    print(f"\n{name:24}{'lora-jax':>12}{'PEFT':>12}{'ratio':>8}{'target':>9}")
    ours, theirs, ratio, target = result["lora-jax"], result["peft"], result["ratios"], result["targets"]
    memory = "peak_device_bytes" if theirs["peak_device_bytes"] else "peak_host_bytes"
    rows = (
        ("useful tokens/s", ours["tokens_per_second"], theirs["tokens_per_second"], ratio["speed"], f">= {target['speed']}"),
        ("by CPU second", ours["tokens_per_cpu_second"], theirs["tokens_per_cpu_second"], ratio["speed_by_cpu_time"], ""),
        ("peak memory, MB", ours[memory] / 1e6, theirs[memory] / 1e6, ratio["memory"], f"<= {target['memory']}"),
        ("first step after, s", ours["first_step_seconds"], theirs["first_step_seconds"], ratio["first_step"], ""),
    )
    for label, a, b, quotient, aim in rows:
        print(f"{label:24}{a:12,.1f}{b:12,.1f}{quotient:8.2f}{aim:>9}")
    print(f"speed ratio from {ratio['speed_lowest']} to {ratio['speed_highest']}; compiling took {ours['compile_seconds']} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a round (default 10)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each side (default 7)")
    parser.add_argument("--output", type=Path, help="JSON file; by default results/vs_peft_<device>.json beside this file")
    options = parser.parse_args(argv)
    if min(options.steps, options.rounds) < 1:
        parser.error("--steps and --rounds must be positive")
    cases = {}
    for name in CASES if options.case == "all" else [options.case]:
        cases[name] = race(name, options.steps, options.rounds)
        show(name, cases[name])
    kind = next(iter(cases.values()))["peft"]["device"]
    output = options.output or HERE / "results" / f"vs_peft_{kind.lower().replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/vs_peft.py", *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(cases),
        "python": platform.python_version(),
        "cases": cases,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
