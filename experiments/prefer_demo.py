"""Does DPO with a small adapter teach a 135M chat model which of two answers people preferred?

    python experiments/prefer_demo.py --data FOLDER [key=value ...]

FOLDER has files of JSON lines with prompt, chosen and rejected (see configs/prefer_demo.yaml, which this runs). Their rows are pooled and
split anew, for a test on more of them. Nothing is chosen by the test rows: the adapters are those of the last step.

Before: the base prefers nothing, since all rewards are 0 where the adapter is off; a coin would be right for half of the pairs. Beside it,
how often the base itself finds the chosen answer likelier, by the sum of its tokens' log-probabilities and by their mean.
After: how often the chosen answer has the larger reward, beta (log pi - log pi_ref), as mean over seeds, with a 95 % interval over seeds
and test pairs.

Expected, on 300 rows of general chat (58 training and 53 test pairs have room in 128 tokens): 68.6 % +- 12.3 after, by seed 71.7, 66.0
and 67.9 %; before, 50 % by construction, and the base finds the chosen answer likelier in 39.6 % by either measure. Two epochs over 58
pairs are learned by heart (training loss 0.11, test loss 0.61). A first run at a rate of 5e-4 was stopped after 30 steps, when its training
loss was still 0.68; this is the second, and no third was made. Figures are in results/prefer_demo.json and figures/prefer_demo.png.
Time: 16 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.analysis.metrics import Paired
from lora_jax.tracking import MemberResult
from lora_jax.training.setup import set_up

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of .jsonl files")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for the pooled rows and the run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "prefer_demo.json")
    parser.add_argument("--figure", type=Path, default=HERE / "figures" / "prefer_demo.png")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    files = sorted(args.data.glob("*.jsonl"))
    if not files:
        parser.error(f"--data: {args.data} has no .jsonl file")
    args.work.mkdir(parents=True, exist_ok=True)
    pooled = args.work / "preferences.jsonl"
    pooled.write_text("".join(file.read_text(encoding="utf-8").rstrip("\n") + "\n" for file in files), encoding="utf-8")
    overrides = [f"task.source={pooled.resolve()}", f"tracking.dir={args.work}", *args.overrides]
    config = lora_jax.load_config("configs/prefer_demo.yaml", overrides)
    outcome = lora_jax.sweep(config)
    found = findings(outcome.results) | {"before": of_base(config), "seconds": round(max(r.seconds for r in outcome.results))}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.figure)
    print(json.dumps(found, indent=1))


def of_base(config: lora_jax.Config) -> dict[str, float]:
    """How often the base finds the chosen answer of a test pair likelier."""
    setup = set_up(config)
    assert setup.data.test is not None
    right = {"coin": [], "base_sum": [], "base_mean": []}
    for batch in setup.plan.eval_batches(setup.data.test):
        logp = np.asarray(setup.held_out_inputs(batch, None)["target_reference"])
        for example in np.flatnonzero(batch["example_weights"]):
            own = (batch["target_examples"] == example) & (batch["target_weights"] > 0)
            chosen, rejected = (logp[own & (batch["target_roles"] == role)] for role in (0, 1))
            right["base_sum"].append(chosen.sum() > rejected.sum())
            right["base_mean"].append(chosen.mean() > rejected.mean())
            right["coin"].append(0.5)
    return {name: float(np.mean(values)) for name, values in right.items()}


def findings(results: list[MemberResult]) -> dict[str, object]:
    """The test accuracy of each seed, and their mean less that of a coin with its interval."""
    batches = [r.test_batches for r in results if r.test_batches is not None]
    sizes = np.array(batches[0]["targets"])
    right = np.array([b["right"] for b in batches])
    gain = Paired.of(right - 0.5 * sizes, sizes)
    return {
        "pairs": int(sizes.sum()),
        "accuracy_of_seeds": [round(r.test["accuracy"], 4) for r in results],
        "accuracy": round(0.5 + gain.mean, 4),
        "gain_over_a_coin": round(gain.mean, 4),
        "half_width": round(gain.half_width, 4),
        "half_width_of_seeds": gain.of_seeds,
        "half_width_of_pairs": gain.of_rows,
        "p": gain.p,
        "test": {name: round(float(np.mean([r.test[name] for r in results])), 4) for name in results[0].test},
        "held_out": {name: round(float(np.mean([r.final[name] for r in results])), 4) for name in results[0].final},
        "steps": results[0].steps,
        "tokens": results[0].tokens,
        "parameters": results[0].parameters,
    }


def draw(found: dict, path: Path) -> None:
    """Accuracy before and after, in percent of the test pairs."""
    figure = Figure(figsize=(6.4, 3.4), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    before = found["before"]
    names = ["no preference", "base: sum of log p", "base: mean log p", "after DPO"]
    values = [100 * v for v in (before["coin"], before["base_sum"], before["base_mean"], found["accuracy"])]
    axes.bar(names, values, color=["#c8ccd0", "#9db7cc", "#9db7cc", "#1b6ca8"], width=0.6)
    axes.errorbar([3], values[3:], yerr=[100 * found["half_width"]], color="black", capsize=5)
    axes.plot([3] * len(found["accuracy_of_seeds"]), [100 * a for a in found["accuracy_of_seeds"]], "o", color="#d1742f", markersize=5)
    axes.axhline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set(ylabel="chosen above rejected (%)", ylim=(0, 100), title=f"{found['pairs']} test pairs, {found['steps']} steps, 3 seeds")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
