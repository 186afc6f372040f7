"""Which rank, and is the difference real? MiniLM on film reviews, adapters on the last two layers.

    python experiments/rank_sweep.py

Ranks 1 to 32 x 2 learning rates x 3 seeds. Each rank is judged at its own best learning rate, by means and 95 % intervals over seeds, and
by differences to rank 1 that are paired by seed: members of one seed see the same batches, and rank 2 starts as rank 1 does.
"""

from __future__ import annotations

import lora_jax

OVERRIDES = ["name=rank_sweep", "adapter.targets=attention", "adapter.layers=last:2", "training.steps=64", "training.eval_every=0"]
GRID = {"adapter.rank": [1, 2, 8, 32], "optimizer.learning_rate": [2e-3, 8e-3], "training.seed": [0, 1, 2]}


def main() -> None:
    outcome = lora_jax.sweep(lora_jax.load_config("configs/quickstart.yaml", OVERRIDES), GRID)
    print(outcome.path)


if __name__ == "__main__":
    main()
