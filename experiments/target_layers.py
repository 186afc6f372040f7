"""Attention or MLP, and which layers, at equal numbers of parameters? MiniLM on film reviews.

python experiments/target_layers.py
"""

from __future__ import annotations

import json

import lora_jax
from lora_jax.adapters.describe import rank_for

OVERRIDES = ["name=target_layers", "task.eval_size=500", "training.steps=64", "training.batch_size=16", "training.eval_every=0"]


def main() -> None:
    config = lora_jax.load_config("configs/quickstart.yaml", OVERRIDES)
    base = lora_jax.load_model(config.model.source)
    one = {targets: config.adapter.model_copy(update={"targets": targets, "layers": "last:2"}) for targets in ("mlp", "attention")}
    budget = 4 * 3840 * 2
    ranks = {targets: rank_for(base, adapter, budget) for targets, adapter in one.items()}
    sweep = {
        "grid": {
            "adapter.layers": ["first:2", "2-3", "last:2"],
            "optimizer.learning_rate": [2e-3, 8e-3],
        },
        "zip": {"adapter.targets": list(ranks), "adapter.rank": list(ranks.values())},
        "seeds": 3,
        "max_pack": 12,
    }
    config = lora_jax.load_config("configs/quickstart.yaml", [*OVERRIDES, f"sweep={json.dumps(sweep)}"])
    print(ranks, lora_jax.sweep(config).path)


if __name__ == "__main__":
    main()
