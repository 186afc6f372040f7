"""The PEFT side of `sweep_vs_peft.py`: trains the members one after the other in this process, then prints their results.

Started as `_sweep_vs_peft_worker.py CASE FOLDER STEPS RANK ...`. The last line it prints is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from _vs_peft_worker import Peft
from sweep_vs_peft import sweep_cases


class Member(Peft):
    """One adapter on a base loaded for it."""

    def held_out_loss(self, folder: Path) -> float:
        """Mean loss of a label on the held-out rows."""
        data = self._read(folder / "held_out.npz")
        self.model.eval()
        total = count = 0.0
        with torch.no_grad():
            for start in range(0, len(data[0]), 32):
                batch = self.padded(data, list(range(start, min(start + 32, len(data[0])))))
                labels = int((batch["labels"][:, 1:] != -100).sum()) if self.causal else len(batch["labels"])
                total += float(self.model(**{k: v.to(self.device) for k, v in batch.items()}).loss) * labels
                count += labels
        return total / count


def main(name: str, folder: Path, steps: int, ranks: list[int]) -> None:
    """Trains, evaluates and saves every member."""
    losses, facts = [], {}
    for number, case in enumerate(sweep_cases(folder, ranks)[name].members(steps)):
        member = Member(case, folder, steps)
        member.train(steps)
        losses.append(member.held_out_loss(folder))
        member.model.save_pretrained(str(folder / "adapters" / str(number)))
        facts = {k: v for k, v in member.facts().items() if k in ("device", "threads")}
        del member
    print(json.dumps(facts | {"held_out_losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), [int(rank) for rank in sys.argv[4:]])
