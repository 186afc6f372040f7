"""A whole sweep compared with Hugging Face PEFT: 16 members, ranks 1 to 128 on two sets of targets, from start to the last saved adapter.

    python experiments/benchmarks/sweep_vs_peft.py [--case all-layers|top-layers|gpu] [--steps N] [--rounds N] [--ranks R ...]

One side is the command `lora-jax sweep`. The other trains the members one after the other in one process (a plain PyTorch loop, each
batch padded to its longest example). Both load the base, take the same number of steps over the same rows, evaluate on the same held-out
rows and save every adapter; lora-jax also compiles. Wall time is that of the whole process. The sides alternate, and so does the first one.

- `all-layers`: MiniLM on film reviews, every layer adapted; its six layers are compiled one by one (`model.scan_layers: false`).
- `top-layers`: the same over three epochs, the last two of six layers adapted, with the trunk cache.
- `gpu`: SmolLM2's shape, batches of 8 x 128 tokens; for a machine with a GPU, which both sides use.

Needs the `[interop]` extra and the asset packages.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import multiprocessing
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from _sides import cpu_name, side_environment, warn_if_busy
from _vs_peft_cases import CASES, OPTIMIZER, REVIEWS, Case, prepare

HERE = Path(__file__).resolve().parent
RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
# Names mean the same to both sides: a module whose path ends so.
BERT_TARGETS = [["query", "value"], ["intermediate.dense", "output.dense"]]
LLAMA_TARGETS = [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]]
EPOCHS = 3  # of `top-layers`
LONG_TEXTS = 500  # of `gpu`


@dataclasses.dataclass(frozen=True)
class SweepCase:
    """One comparison.

    Attributes:
        single: model and task, as `vs_peft.py` has them.
        targets: the sets.
        layers: which are adapted; None: all.
        cached: whether lora-jax keeps the shared prefix.
        scan_layers: whether lora-jax runs the layers as one loop.
        pack: how members of a pack are run.
        max_padding: below the default: with ranks up to 128 a few packs more cost their compilation, and less arithmetic in every step.
        aim: how many times faster we want to be.
        ranks: on each set of targets.
    """

    single: Case
    targets: list[list[str]]
    layers: list[int] | None
    cached: bool
    scan_layers: bool
    pack: str
    max_padding: float
    aim: float
    ranks: list[int]

    def members(self, steps: int) -> list[Case]:
        """A case of `vs_peft.py` for each."""
        base = self.config(steps)
        own = {} if self.layers is None else {"layers": self.layers}
        adapters = [{"rank": r, "alpha": 16, "targets": t, **own} for t in self.targets for r in self.ranks]
        return [dataclasses.replace(self.single, config=base | {"adapter": a}) for a in adapters]

    def config(self, steps: int) -> dict[str, Any]:
        """Model, task, adapter and training of all members; EPOCHS passes over the rows where the prefix is kept."""
        task = self.single.config["task"] | {"eval_size": 256}
        training = self.single.config["training"]
        if self.cached:
            task |= {"train_size": max(1, steps // EPOCHS) * training["batch_size"]}
            training = training | {"cache_trunk": "on"}
        layers = {} if self.layers is None else {"layers": self.layers}
        return self.single.config | {"task": task, "training": training, "adapter": {"alpha": 16, **layers}}

    def sweep(self, steps: int, folder: Path) -> dict[str, Any]:
        """The config of `lora-jax sweep`."""
        config = self.config(steps)
        return config | {
            "name": "sweep",
            "model": config["model"] | {"scan_layers": self.scan_layers},
            "optimizer": OPTIMIZER,
            "training": config["training"] | {"steps": steps, "pack": self.pack},
            "tracking": {"dir": str(folder / "runs"), "save": "final"},
            "sweep": {"grid": {"adapter.targets": self.targets, "adapter.rank": self.ranks}, "max_padding": self.max_padding},
        }


def sweep_cases(folder: Path, ranks: list[int]) -> dict[str, SweepCase]:
    """All of them; `folder` is where the long texts of `gpu` will be."""
    minilm, smollm2 = CASES["minilm"], CASES["smollm2"]
    task = {"kind": "causal_lm", "source": str(folder / "texts.jsonl"), "text": "text", "max_length": 128}
    gpu = dataclasses.replace(smollm2, config=smollm2.config | {"task": task})
    return {
        "all-layers": SweepCase(
            minilm, BERT_TARGETS, None, cached=False, scan_layers=False, pack="scan", max_padding=0.1, aim=2.0, ranks=ranks
        ),
        "top-layers": SweepCase(
            minilm, BERT_TARGETS, [4, 5], cached=True, scan_layers=True, pack="scan", max_padding=0.15, aim=5.0, ranks=ranks
        ),
        "gpu": SweepCase(gpu, LLAMA_TARGETS, None, cached=False, scan_layers=True, pack="vmap", max_padding=0.15, aim=8.0, ranks=ranks),
    }


def write_long_texts(folder: Path) -> None:
    """Film reviews, several joined, so that each text fills 128 tokens."""
    from lora_jax.data.sources import load_rows

    rows = load_rows(REVIEWS["source"], key="task.source", columns=[REVIEWS["text"]], drop=REVIEWS["drop"])
    texts = [str(t) for t in rows[REVIEWS["text"]]]
    with (folder / "texts.jsonl").open("w") as file:
        for i in range(LONG_TEXTS):
            file.write(json.dumps({"text": " ".join(texts[12 * i : 12 * (i + 1)])}) + "\n")


def run_ours(case: SweepCase, folder: Path, steps: int) -> dict[str, Any]:
    """`lora-jax sweep`, from start to end."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        config = Path(own) / "sweep.yaml"
        config.write_text(yaml.safe_dump(case.sweep(steps, Path(own))))
        command = [sys.executable, "-m", "lora_jax.cli.main", "sweep", str(config)]
        began = time.perf_counter()
        done = subprocess.run(command, env=side_environment(), capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"lora-jax sweep failed:\n{done.stderr}")
        with (Path(own) / "runs" / "sweep" / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        summary = json.loads((Path(own) / "runs" / "sweep" / "state.json").read_text())["summary"]
    losses = [float(row["final_loss"]) for row in rows]
    return {
        "seconds": round(seconds, 2),
        "members": len(rows),
        "packs": summary["packs"],
        "compiled_programs": summary["compiled_programs"],
        **spread(losses),
    }


def run_peft(name: str, folder: Path, steps: int, ranks: list[int]) -> dict[str, Any]:
    """The members one after the other, in a process of their own."""
    command = [sys.executable, str(HERE / "_sweep_vs_peft_worker.py"), name, str(folder), str(steps), *map(str, ranks)]
    began = time.perf_counter()
    done = subprocess.run(command, env=side_environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the PEFT side failed:\n{done.stderr}")
    facts = json.loads(done.stdout.splitlines()[-1])
    losses = facts.pop("held_out_losses")
    return {"seconds": round(seconds, 2), "members": len(losses), **facts, **spread(losses)}


def spread(losses: list[float]) -> dict[str, float]:
    """The members' losses on the held-out rows, so that one sees that both sides trained."""
    return {"held_out_loss": round(statistics.mean(losses), 4), "best_loss": round(min(losses), 4)}


def race(name: str, steps: int, rounds: int, ranks: list[int]) -> dict[str, Any]:
    """Runs one case; returns all its figures."""
    with tempfile.TemporaryDirectory(prefix="sweep_vs_peft-") as text:
        folder = Path(text)
        case = sweep_cases(folder, ranks)[name]
        if name == "gpu":
            write_long_texts(folder)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, case.members(steps)[0], text).result()
        load, done = warn_if_busy(), []
        for number in range(rounds):
            sides = [lambda: ("lora-jax", run_ours(case, folder, steps)), lambda: ("peft", run_peft(name, folder, steps, ranks))]
            done.append(dict(side() for side in (sides if number % 2 == 0 else reversed(sides))))
            ours, theirs = (done[-1][side]["seconds"] for side in ("lora-jax", "peft"))
            print(f"{name} round {number + 1}/{rounds}: lora-jax {ours:,.1f} s, PEFT {theirs:,.1f} s, {theirs / ours:.2f} x", flush=True)
    speeds = [d["peft"]["seconds"] / d["lora-jax"]["seconds"] for d in done]
    return {
        "steps": steps,
        "max_padding": case.max_padding,
        "load_average": round(load, 2),
        "members": len(case.targets) * len(ranks),
        "median_seconds": {side: statistics.median(d[side]["seconds"] for d in done) for side in ("lora-jax", "peft")},
        "times_faster": round(statistics.median(speeds), 2),
        "aim": case.aim,
        "rounds": done,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["all-layers", "top-layers", "gpu", "cpu"], default="cpu", help="cpu: the first two (default)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each member (default 120: an hour a round)")
    parser.add_argument("--rounds", type=int, default=3, help="whole sweeps of each side (default 3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="on each of two sets of targets (default 1 to 128)")
    parser.add_argument("--output", type=Path, help="JSON file; by default results/sweep_vs_peft_<case>_<device>.json beside this file")
    options = parser.parse_args(argv)
    if options.steps < EPOCHS or options.rounds < 1:
        parser.error(f"--steps must be at least {EPOCHS}, --rounds at least 1")
    cases = {}
    for name in ["all-layers", "top-layers"] if options.case == "cpu" else [options.case]:
        cases[name] = race(name, options.steps, options.rounds, options.ranks)
        print(f"{name}: {cases[name]['times_faster']} x faster than PEFT (aim: {cases[name]['aim']} x)", flush=True)
    kind = next(iter(cases.values()))["rounds"][0]["peft"]["device"]
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/sweep_vs_peft.py", *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name() if kind == "cpu" else kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers", "peft")},
        "cases": cases,
    }
    output = options.output or HERE / "results" / f"sweep_vs_peft_{options.case}_{kind.lower().replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
