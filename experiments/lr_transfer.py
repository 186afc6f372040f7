"""Does the best learning rate of one rank serve another? alpha / r, alpha / sqrt(r) (rsLoRA) and a constant scale, MiniLM on film reviews.

    python experiments/lr_transfer.py [--ranks 1 2 4 ... 128] [--rates 6] [--seeds 2] [--steps 48]

LoRA adds s B A. With s = alpha / r, a larger rank takes smaller steps, and so wants a larger rate; rsLoRA (arXiv:2312.03732) says that
s = alpha / sqrt(r) keeps steps equal, and a constant s (alpha proportional to r) is the other end. All three have the same scale at rank 8,
and share its members. For each rule and rank the best rate is the one with the lowest held-out loss, at the top of a parabola through the
best of the grid and its neighbours (over the logarithm of the rate); the slope of its logarithm over the rank's says how it moves: 0 is a
rate that transfers.

One sweep over one base: its ranks are padded to one another as far as that pays. Results: results/lr_transfer.json,
figures/lr_transfer.png. Stopped in between, the same command goes on. Sized for about an hour on 2 cores (264 members); not yet run whole.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.analysis import Estimate
from lora_jax.tracking import MemberResult
from lora_jax.tracking.rundir import describe_environment

RULES = {"alpha/r": "#1b6ca8", "alpha/sqrt(r)": "#d1742f", "constant": "#3f8f4f"}
# The rank at which all rules have one scale, and that.
MEETING, SCALE = 8, 2.0
CENTRE, FACTOR = 4e-3, 4.0
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--rates", type=int, default=6, help="learning rates, each 4 times the one before")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rows", type=int, default=500, help="held-out rows")
    parser.add_argument("--name", default="lr_transfer", help="of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results/ and figures/")
    args = parser.parse_args()
    rates = [float(f"{CENTRE * FACTOR ** (i - args.rates // 2):.3g}") for i in range(args.rates)]
    points = members(args.ranks, rates, args.seeds)
    values = {
        "name": args.name,
        "adapter.targets": "attention",
        "adapter.layers": "last:2",
        "task.eval_size": args.rows,
        "training.steps": args.steps,
        "training.batch_size": 16,
        "training.eval_every": 0,
        "tracking.dir": str(args.runs),
        "tracking.save": "none",
        "tracking.tensorboard": False,
        "sweep": {"members": points, "max_pack": 48},
    }
    config = lora_jax.load_config("configs/quickstart.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])
    found = findings(lora_jax.sweep(config).results)
    for rule, own in found["rules"].items():
        slope = "unknown" if own["slope"] is None else f"rank^{own['slope']:+.2f}"
        told = ", ".join(f"{rank}: {one['best_rate']:.2g}" for rank, one in own["ranks"].items() if one["best_rate"])
        print(f"{rule}: the best rate goes as {slope} ({told})")
    path = args.out / "results" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"steps": args.steps, "seeds": args.seeds, "environment": describe_environment()}, indent=1) + "\n")
    draw(found, args.out / "figures" / f"{args.name}.png")


def settings(rule: str, rank: int) -> dict[str, Any]:
    """What gives a rank the rule's scale."""
    alphas = {"alpha/r": SCALE * MEETING, "alpha/sqrt(r)": SCALE * math.sqrt(MEETING), "constant": SCALE * rank}
    return {"adapter.rank": rank, "adapter.alpha": alphas[rule], "adapter.rslora": rule == "alpha/sqrt(r)"}


def members(ranks: list[int], rates: list[float], seeds: int) -> list[dict[str, Any]]:
    """The points of the sweep. At the rank where the rules meet they would train the same three times, so one of them does."""
    return [
        {**settings(rule, rank), "optimizer.learning_rate": rate, "training.seed": seed}
        for rule in RULES
        for rank in ranks
        if rank != MEETING or rule == "alpha/r"
        for rate in rates
        for seed in range(seeds)
    ]


def findings(results: list[MemberResult]) -> dict[str, Any]:
    """For each rule and rank: the held-out loss by rate and the best rate; and the slope of its logarithm over the rank's."""
    losses: dict[tuple[int, float, bool], dict[float, list[float]]] = {}
    for r in results:
        key = (r.settings["adapter.rank"], float(r.settings["adapter.alpha"]), r.settings["adapter.rslora"])
        loss = r.final.get("loss", math.nan) if r.status == "finished" else math.nan
        losses.setdefault(key, {}).setdefault(float(r.settings["optimizer.learning_rate"]), []).append(loss)
    rules: dict[str, Any] = {}
    for rule in RULES:
        ranks: dict[str, Any] = {}
        for rank in sorted({key[0] for key in losses}):
            by_rate = losses[tuple(settings(rule if rank != MEETING else "alpha/r", rank).values())]
            means = {rate: Estimate.of(own) for rate, own in sorted(by_rate.items())}
            best, inside = best_rate({rate: e.mean for rate, e in means.items()})
            shown = {f"{rate:g}": None if math.isnan(e.mean) else e.mean for rate, e in means.items()}
            ranks[str(rank)] = {"best_rate": best, "inside_the_grid": inside, "loss": shown}
        known = [(int(rank), one["best_rate"]) for rank, one in ranks.items() if one["inside_the_grid"]]
        slope = None
        if len(known) > 1:
            x, y = np.log(np.array(known, float)).T
            slope = float(np.polyfit(x, y, 1)[0])
        rules[rule] = {"slope": slope, "ranks": ranks}
    return {"rules": rules}


def best_rate(losses: dict[float, float]) -> tuple[float | None, bool]:
    """The rate of the lowest loss, and whether rates beyond it on both sides were tried; None where every loss is NaN.

    Inside, it is the lowest point of the parabola through the best and its neighbours, over the logarithm of the rate.
    """
    rates = sorted(losses)
    finite = [rate for rate in rates if math.isfinite(losses[rate])]
    if not finite:
        return None, False
    best = min(finite, key=lambda rate: losses[rate])
    place = rates.index(best)
    if place in (0, len(rates) - 1):
        return best, False
    left, right = losses[rates[place - 1]], losses[rates[place + 1]]
    curve = left - 2 * losses[best] + right
    if not math.isfinite(curve) or curve <= 0:  # a neighbour diverged
        return best, True
    step = math.log(rates[place + 1] / best)
    return best * math.exp(step * (left - right) / (2 * curve)), True


def draw(found: dict[str, Any], path: Path) -> None:
    """Left: the best rate over the rank; hollow where it lies at an end of the grid. Right: the loss there."""
    figure = Figure(figsize=(9.5, 3.8), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for rule, colour in RULES.items():
        own = found["rules"][rule]
        known = {int(rank): one for rank, one in own["ranks"].items() if one["best_rate"] is not None}
        ranks, rates = list(known), [one["best_rate"] for one in known.values()]
        slope = "" if own["slope"] is None else f" (rank^{own['slope']:+.2f})"
        left.plot(ranks, rates, "-", color=colour, label=rule + slope)
        for rank, one in known.items():
            left.plot(rank, one["best_rate"], "o", color=colour, markersize=5, fillstyle="full" if one["inside_the_grid"] else "none")
        right.plot(
            ranks, [min(v for v in one["loss"].values() if v is not None) for one in known.values()], "o-", color=colour, markersize=4
        )
    left.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate", title="Does the best rate transfer over ranks?")
    right.set(xscale="log", xlabel="rank", ylabel="held-out loss at the best rate of the grid", title="What the rule costs")
    for axes in (left, right):
        axes.set_xticks(ranks, [str(r) for r in ranks], minor=False)
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
