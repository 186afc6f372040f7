"""Model cards: the `README.md` beside an export, which says what it is, how it was made and how well it did."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..tracking import MemberResult
from .hf import architecture

_USES = {
    "decoder": ("AutoModelForCausalLM", "text-generation"),
    "encoder": ("AutoModel", "feature-extraction"),
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "token_classification": ("AutoModelForTokenClassification", "token-classification"),
    "question_answering": ("AutoModelForQuestionAnswering", "question-answering"),
}


def model_card(
    config: Config,
    result: MemberResult,
    *,
    kind: str,
    model_type: str,
    adapter: str,
    form: str,
    environment: Mapping[str, Any],
    classes: tuple[str, ...] | None = None,
) -> str:
    """The text of a card.

    Args:
        config: the member's.
        result: what it came to.
        kind: of the model: of its head, or `decoder` or `encoder`.
        model_type: Hugging Face's name of the base's family.
        adapter: which of its adapters was taken: `best` or `final`.
        form: `hf` (merged) or `peft`.
        environment: what the run ran on (`environment.json`).
        classes: names of the classes, where the model has such.
    """
    base, auto = public_name(config.model.source), _USES[kind][0]
    title = f"{config.name}: {result.name}" if result.name != "main" else config.name
    lines = [*_front(config, kind, form), f"# {title}", ""]
    if form == "hf":
        lines += [f"`{base}` with a trained adapter merged into its weights ({architecture(model_type, _head(kind))}).", ""]
    else:
        lines += [f"A LoRA adapter for `{base}`, in PEFT's format.", ""]
    lines += ["## Use", "", "```python", *_snippet(auto, form, base, config.model.source, classes), "```", ""]
    lines += ["## How it was made", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in _facts(config, result, base, classes).items()]
    metrics = result.best if adapter == "best" else result.final
    step = result.best_step if adapter == "best" else result.steps
    lines += ["", "## Figures", "", f"On the held-out examples, at step {step}:", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {name} | {'n/a' if math.isnan(value) else f'{value:.4f}'} |" for name, value in metrics.items()]
    packages: Mapping[str, Any] = environment.get("packages") or {}
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in packages.items()) or "unknown"]
    return "\n".join(lines) + "\n"


def public_name(source: str) -> str:
    """A source as others may read it: no folders of this machine.

    >>> public_name("hf://Qwen/Qwen3-0.6B@main"), public_name("/home/ann/models/mine"), public_name("package://a_b/model")
    ('Qwen/Qwen3-0.6B', 'mine', 'package://a_b/model')
    """
    if source.startswith("hf://"):
        return source.removeprefix("hf://").partition("@")[0]
    return source if "://" in source else Path(source).name


def _head(kind: str) -> str | None:
    return None if kind in ("decoder", "encoder") else kind


def _front(config: Config, kind: str, form: str) -> list[str]:
    lines = ["---", f"library_name: {'transformers' if form == 'hf' else 'peft'}", f"pipeline_tag: {_USES[kind][1]}"]
    if config.model.source.startswith("hf://"):
        lines.append(f"base_model: {public_name(config.model.source)}")
        lines.append(f"base_model_relation: {'finetune' if form == 'hf' else 'adapter'}")
    return [*lines, "tags: [lora, lora-jax]", "---", ""]


def _snippet(auto: str, form: str, base: str, source: str, classes: tuple[str, ...] | None) -> list[str]:
    if form == "hf":
        imports, tokenizer = f"from transformers import {auto}, AutoTokenizer", ['tokenizer = AutoTokenizer.from_pretrained("PATH")']
        return [imports, "", f'model = {auto}.from_pretrained("PATH")', *tokenizer]
    place = base if source.startswith("hf://") else "PATH OF THE BASE"
    labels = f", num_labels={len(classes)}" if classes and auto != "AutoModelForCausalLM" else ""
    loads = [f'base = {auto}.from_pretrained("{place}"{labels})', 'model = PeftModel.from_pretrained(base, "PATH")']
    return ["from peft import PeftModel", f"from transformers import {auto}", "", *loads]


def _facts(config: Config, result: MemberResult, base: str, classes: tuple[str, ...] | None) -> dict[str, str]:
    adapter, task, training, optimizer = config.adapter, config.task, config.training, config.optimizer
    facts = {"base": f"`{base}`", "method": adapter.method}
    if adapter.method == "lora":
        facts |= {
            "rank, alpha": f"{adapter.rank}, {adapter.alpha:g}"
            + (" (scaled by alpha / sqrt(rank))" if getattr(adapter, "rslora", False) else ""),
            "targets": f"`{json.dumps(adapter.targets)}`",
            "layers": "all" if adapter.layers is None else f"`{json.dumps(adapter.layers)}`",
            "dropout": f"{adapter.dropout:g}",
        }
        for name in ("exclude", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if value := getattr(adapter, name):
                facts[name] = f"`{json.dumps(value)}`"
        facts |= {"bias": adapter.bias} if adapter.bias != "none" else {}
    facts |= {
        "trained parameters": f"{result.parameters:,}",
        "task": task.kind.replace("_", " "),
        "data": f"`{public_name(task.source)}`",
        **({"classes": ", ".join(classes)} if classes else {}),
        "steps": f"{result.steps:,} of {training.batch_size} examples, {result.tokens:,} tokens in all",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule}, {optimizer.warmup_steps} steps of warm-up",
        "weight decay": f"{optimizer.weight_decay:g}",
        "seed": str(training.seed),
    }
    return facts | {key: f"`{json.dumps(value)}`" for key, value in result.settings.items() if key not in _TOLD}


# Swept keys that the table speaks of anyway.
_TOLD = {
    "adapter.rank", "adapter.alpha", "adapter.targets", "adapter.layers", "adapter.dropout", "optimizer.learning_rate",
    "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay", "training.seed", "training.batch_size", "adapter.method",
}  # fmt: skip
