"""Attention or MLP, and which layers, at equal numbers of parameters? MiniLM on film reviews.

    python experiments/target_layers.py [key=value ...]

Compares attention and MLP in the first, middle and last two of six layers. An update of rank 1 has 4 x 768 parameters in a layer's
attention and 2 x 1,920 in its MLP, so equal ranks have unequal sizes. The ranks are therefore computed from a budget of
parameters. Each of the six settings is compared at the better of two learning rates, with 3 seeds (36 members in three packs).
MLP is compared with attention on the same layers, paired by seed.

Expected: ranks 5 and 4, with 30,720 parameters each (and a head of 770). Attention in the middle layers is best with 77.6 +- 0.5 %
accuracy. Attention is 1.5 to 1.9 points ahead of MLP on the same layers; with 3 seeds that may be chance.
The figures are in results/target_layers.csv. Time: 19 minutes on 2 busy cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

import lora_jax
from lora_jax.adapters.describe import rank_for
from lora_jax.analysis import rates_table, report_run, results_table, write_summary_csv
from lora_jax.config.schema import AdapterConfig

BUDGET = 30_720
LAYERS = ["first:2", "2-3", "last:2"]
OVERRIDES = ["name=target_layers", "task.eval_size=500", "training.steps=64", "training.batch_size=16", "training.eval_every=0"]


def main() -> None:
    overrides = [*OVERRIDES, *sys.argv[1:]]
    base = lora_jax.load_model(lora_jax.load_config("configs/quickstart.yaml", overrides).model.source)
    ranks = {targets: rank_for(base, AdapterConfig(targets=targets, layers=LAYERS[0]), BUDGET) for targets in ("attention", "mlp")}
    reference = {"adapter.targets": "attention", "adapter.rank": ranks["attention"]}
    sweep = {
        "grid": {"adapter.layers": LAYERS, "optimizer.learning_rate": [2e-3, 8e-3]},
        "zip": {"adapter.targets": list(ranks), "adapter.rank": list(ranks.values())},
        "seeds": 3,
        "reference": reference,
        "max_pack": 12,  # one pack per pair of layers: its trunk is computed once for all twelve members
    }
    outcome = lora_jax.sweep(lora_jax.load_config("configs/quickstart.yaml", [*overrides, f"sweep={json.dumps(sweep)}"]))
    sizes = {result.parameters for result in outcome.results}
    assert max(sizes) < 1.05 * min(sizes), f"sizes {sizes} are not equal"
    console = Console()
    console.print(results_table(outcome.results, reference=reference))
    console.print(rates_table(outcome.results, reference=reference))
    write_summary_csv(Path(__file__).parent / "results" / "target_layers.csv", outcome.results, reference)
    console.print(f"report: {report_run(outcome.path)}")


if __name__ == "__main__":
    main()
