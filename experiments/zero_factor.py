"""Which factor starts at zero, and what does that do to the best learning rate? MiniLM on film reviews (arXiv:2406.08447).

    python experiments/zero_factor.py [key=value ...]

LoRA's product B A has to start at 0. The default has B = 0 and A random (the paper's Init[A]); `zero_a` has A = 0 and B random (Init[B]).
For wide models the paper predicts that Init[A] stays stable at larger learning rates, and so learns more at its best one. Here both are
trained at 5 learning rates with 3 seeds: 30 members in two packs of one sweep, on the attention of the last two layers. Each init is
taken at its own best rate, and the two are then compared seed by seed: members of one seed see the same batches and have the same head.

Figures are written to results/zero_factor.json and figures/zero_factor.png. Time: 10 minutes of one core beside other work (AMD EPYC).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.analysis import Estimate
from lora_jax.tracking.rundir import describe_environment

INITS = {"default": "A random, B = 0", "zero_a": "A = 0, B random"}
RATES = [2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2]
SEEDS = [0, 1, 2]
SWEEP = {"grid": {"adapter.init": list(INITS), "optimizer.learning_rate": RATES, "training.seed": SEEDS}}
OVERRIDES = [
    "name=zero_factor",
    "adapter.rank=8",
    "adapter.targets=attention",
    "adapter.layers=last:2",
    "training.steps=48",
    "training.eval_every=0",
    "tracking.save=none",
    f"sweep={json.dumps(SWEEP)}",
]
HERE = Path(__file__).parent


def main() -> None:
    outcome = lora_jax.sweep(lora_jax.load_config("configs/quickstart.yaml", [*OVERRIDES, *sys.argv[1:]]))
    metric = outcome.results[0].metric
    scores: dict[str, dict[float, dict[int, float]]] = {}
    for result in outcome.results:
        init, rate, seed = (result.settings[key] for key in ("adapter.init", "optimizer.learning_rate", "training.seed"))
        # A member that diverged has learned nothing: it keeps its last score where it has one, and counts as 0 where it has none.
        score = result.final.get(metric, math.nan)
        scores.setdefault(init, {}).setdefault(rate, {})[seed] = score if math.isfinite(score) else 0.0
    found = summary(scores, metric)
    for init, own in found["inits"].items():
        best = f"{own['best_rate']:g}"
        print(f"{init} ({INITS[init]}): best rate {best}, {metric} {text(own['rates'][best])}")
    print(f"zero_a - default, each at its own best rate, paired by seed: {text(found['difference'])}")
    write(found, HERE / "results" / "zero_factor.json")
    draw(found, metric, HERE / "figures" / "zero_factor.png")


def summary(scores: dict[str, dict[float, dict[int, float]]], metric: str) -> dict[str, Any]:
    """Means and 95 % intervals by init and rate, each init's best rate, and the paired difference there; larger scores are better."""
    inits: dict[str, Any] = {}
    for init, by_rate in scores.items():
        means = {rate: Estimate.of(list(own.values())) for rate, own in by_rate.items()}
        best = max(means, key=lambda rate: means[rate].mean)
        at_the_edge = best in (min(means), max(means))
        rates = {f"{rate:g}": interval(e) | {"seeds": {str(s): v for s, v in by_rate[rate].items()}} for rate, e in means.items()}
        inits[init] = {"best_rate": best, "best_rate_is_at_the_edge": at_the_edge, "rates": rates}
    one, other = (scores[init][inits[init]["best_rate"]] for init in INITS)
    return {"metric": metric, "inits": inits, "difference": interval(Estimate.of([other[seed] - one[seed] for seed in one]))}


def interval(estimate: Estimate) -> dict[str, Any]:
    """As JSON."""
    return {"mean": estimate.mean, "half_width": estimate.half_width}


def text(found: dict[str, Any]) -> str:
    """As one reads it."""
    return f"{found['mean']:.4f}" + ("" if found["half_width"] is None else f" +- {found['half_width']:.4f}")


def write(found: dict[str, Any], path: Path) -> None:
    """The figures, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"environment": describe_environment()}, indent=1) + "\n")


def draw(found: dict[str, Any], metric: str, path: Path) -> None:
    """The score over the learning rate, a line an init, with 95 % intervals over seeds; a ring around each one's best."""
    figure = Figure(figsize=(6, 3.9), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (init, own), colour in zip(found["inits"].items(), ("#1b6ca8", "#d1742f"), strict=True):
        x = [float(rate) for rate in own["rates"]]
        mean = [one["mean"] for one in own["rates"].values()]
        half = [one["half_width"] or 0.0 for one in own["rates"].values()]
        axes.errorbar(x, mean, half, fmt="o-", color=colour, label=f"{init}: {INITS[init]}", markersize=4, capsize=3)
        axes.plot(own["best_rate"], own["rates"][f"{own['best_rate']:g}"]["mean"], "o", color=colour, markersize=11, fillstyle="none")
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"held-out {metric}", title="Which factor starts at zero?")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
