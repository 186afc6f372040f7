"""One side of `vs_peft.py`, in its own process: sets up, then trains on request and prints its measurements.

Started as `_vs_peft_worker.py SIDE CASE FOLDER STEPS STARTED`. One JSON line out for each line in: `train N` or `finish`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _vs_peft_cases import CASES, OPTIMIZER, Case


class Side(ABC):
    """Trains one adapter. The constructor does everything before the first step."""

    @abstractmethod
    def train(self, steps: int) -> int:
        """Takes `steps` optimizer steps and waits for the last. Returns the number of tokens trained on, without padding."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Device, versions and whatever else explains the figures."""

    @abstractmethod
    def device_peak(self) -> int | None:
        """Most bytes held on the accelerator at a time; None on a CPU."""


class LoraJax(Side):
    """The product's own path: config, batch plan, pack, compiled step."""

    def __init__(self, case: Case, folder: Path, steps: int):
        import jax

        from lora_jax.config.schema import Config
        from lora_jax.packing.pack import Pack
        from lora_jax.training.setup import set_up

        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        config = Config.model_validate(case.full_config(steps))
        self.setup = set_up(config)
        self.pack = Pack.build(self.setup.model, [config], steps, self.setup.mesh)
        self.state = self.pack.state
        self.batches = enumerate(self.setup.plan.batches(0, steps))

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering and XLA
            self.compile_seconds += seconds

    def train(self, steps: int) -> int:
        import jax

        from lora_jax.parallel.constraints import place_batch

        pack, tokens, metrics = self.pack, 0, None
        for _ in range(steps):
            step, batch = next(self.batches)
            tokens += int((batch["segment_ids"] > 0).sum())
            placed = place_batch(self.setup.mesh, batch, row_axis=1)
            self.state, metrics = pack.programs.train(self.state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        jax.block_until_ready((self.state, metrics))
        pack.programs.check()
        self.loss = float(metrics.loss[0]) if metrics is not None else float("nan")
        return tokens

    def facts(self) -> dict[str, Any]:
        import flax
        import jax

        versions = {"jax": jax.__version__, "flax": flax.__version__}
        kind = jax.devices()[0].device_kind
        plan = {k: round(float(v), 4) for k, v in self.setup.plan.summary.items()}
        return {"device": kind, "versions": versions, "compile_seconds": round(self.compile_seconds, 2), "loss": self.loss, "plan": plan}

    def device_peak(self) -> int | None:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Peft(Side):
    """A plain PyTorch loop: shuffled batches, each padded to its longest example, AdamW, a linear schedule, all threads."""

    def __init__(self, case: Case, folder: Path, steps: int):
        import peft
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX does by default; nothing on a CPU
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.causal = case.task_type == "CAUSAL_LM"
        kind = transformers.LlamaForCausalLM if self.causal else transformers.BertForSequenceClassification
        base = kind.from_pretrained(folder / "base", dtype=torch.float32, **({} if self.causal else {"num_labels": 2}))
        adapter = case.config["adapter"]
        lora = peft.LoraConfig(
            task_type=case.task_type,
            r=adapter["rank"],
            lora_alpha=adapter["alpha"],
            target_modules=adapter["targets"],
            layers_to_transform=adapter.get("layers"),
            use_dora=adapter.get("method") == "dora",
        )
        self.model = peft.get_peft_model(base, lora).to(self.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER["learning_rate"], weight_decay=OPTIMIZER["weight_decay"])
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, 0, steps)
        self.data = self._read(folder / "examples.npz")
        self.batches = self._batches(case.batch_size)

    def _read(self, path: Path) -> tuple[list[Any], Any]:
        """Tokens of each example, and labels."""
        import torch

        data = np.load(path)
        tokens = np.split(data["tokens"], np.cumsum(data["lengths"])[:-1])
        return [torch.from_numpy(t).long() for t in tokens], torch.from_numpy(data["labels"])

    def _batches(self, size: int) -> Iterator[dict[str, Any]]:
        import torch

        while True:
            for chosen in torch.randperm(len(self.data[0])).split(size):
                if len(chosen) == size:
                    yield self.padded(self.data, chosen.tolist())

    def padded(self, data: tuple[list[Any], Any], chosen: list[int]) -> dict[str, Any]:
        """A batch of some examples, padded to the longest."""
        import torch

        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad([data[0][i] for i in chosen], batch_first=True)
        mask = pad([torch.ones_like(data[0][i]) for i in chosen], batch_first=True)
        labels = tokens.masked_fill(mask == 0, -100) if self.causal else data[1][chosen]
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def train(self, steps: int) -> int:
        import torch

        tokens = 0
        for _ in range(steps):
            batch = next(self.batches)
            tokens += int(batch["attention_mask"].sum())
            loss = self.model(**{k: v.to(self.device, non_blocking=True) for k, v in batch.items()}).loss
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.loss = float(loss.detach())
        return tokens

    def facts(self) -> dict[str, Any]:
        import peft
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        kind = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": kind, "versions": versions, "threads": torch.get_num_threads(), "loss": self.loss}

    def device_peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


SIDES = {"lora-jax": LoraJax, "peft": Peft}


def host_peak() -> int:
    """Most bytes this process has had in memory at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(make: Callable[[], Side], started: str) -> None:
    """Runs one side to its end.

    Args:
        make: sets it up.
        started: the time at which the process was started, in seconds.
    """
    # Libraries print what they like; only our answers go out where the parent reads.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trainer = make()
    start = {"set_up_seconds": time.time() - float(started), "set_up_peak_host_bytes": host_peak()}
    trainer.train(1)
    print(json.dumps(start | {"first_step_seconds": time.time() - float(started)}), file=answers)
    idle_since = time.process_time()
    for line in sys.stdin:
        command, *words = line.split()
        if command == "finish":
            peaks = {"peak_host_bytes": host_peak(), "peak_device_bytes": trainer.device_peak()}
            print(json.dumps(trainer.facts() | peaks), file=answers)
            return
        idle = time.process_time() - idle_since
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = trainer.train(int(words[0]))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"tokens": tokens, "seconds": wall, "cpu_seconds": cpu, "idle_cpu_seconds": idle}), file=answers)
        idle_since = time.process_time()


if __name__ == "__main__":
    side, case, folder, steps, started = sys.argv[1:]
    serve(lambda: SIDES[side](CASES[case], Path(folder), int(steps)), started)
