"""Model cards: the `README.md` beside an export says what it is, how it was trained, and its metrics."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.inject import site_modules
from ..config.schema import AdapterConfig, Config
from ..sweeps.restore import Restored
from ..tracking import MemberResult, member_folder, read_json
from .export import kind_of

_ALWAYS_SHOWN = ("method", "rank", "alpha", "targets", "layers", "dropout")
# Swept keys that have rows of their own.
_OWN_ROWS = {f"adapter.{name}" for name in _ALWAYS_SHOWN} | {
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay", "training.seed",
    "training.batch_size",
}  # fmt: skip


def model_card(restored: Restored, *, library: str, relation: str, summary: str, usage: Sequence[str]) -> str:
    """The text of a card.

    Args:
        restored: the member.
        library: that loads the export (`library_name` of the card's metadata).
        relation: of the export to its base: `finetune` or `adapter`.
        summary: a sentence on what it is; {base} in backticks stands for the base's name.
        usage: lines of Python that load it.
    """
    config, classes = restored.member.config, restored.classes
    result = MemberResult.read(restored.run / member_folder(restored.member.name))
    packages: Mapping[str, Any] = read_json(restored.run / "environment.json").get("packages") or {}
    base, kind = public_name(config.model.source), kind_of(restored.model)
    lines = ["---", f"library_name: {library}"]
    lines += [f"pipeline_tag: {kind.pipeline}"] if kind is not None else []
    if config.model.source.startswith("hf://"):
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", base)
        lines += [f"base_model: {base if plain else json.dumps(base)}", f"base_model_relation: {relation}"]
    title = f"{config.name}: {result.name}" if result.name != "main" else config.name
    for key, value in result.settings.items():  # the name of a member tells its settings
        title = title.replace(str(value), _shown(key, value)) if key.endswith("source") else title
    lines += ["tags: [lora, lora-jax]", "---", "", f"# {plain_text(title)}", "", summary.replace("`{base}`", code(base)), ""]
    lines += ["## Use", "", "```python", *usage, "```", "", "## Training", "", "| | |", "| --- | --- |"]
    adapted = bool(site_modules(restored.model))
    lines += [f"| {name} | {value} |" for name, value in _facts(config, result, base, classes, adapted=adapted).items()]
    is_best = restored.folder.name == "best"
    metrics, step = (result.best, result.best_step) if is_best else (result.final, result.steps)
    lines += ["", "## Metrics"]
    parts = [("held-out", metrics), *([("test", result.test)] if result.tested == restored.folder.name else [])]
    for part, values in parts:
        lines += ["", f"On the {part} examples, at step {step}:", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {'n/a' if math.isnan(value) else f'{value:.4f}'} |" for name, value in values.items()]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in packages.items()) or "unknown"]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, card: str | None) -> None:
    """Writes `README.md`; nothing for None."""
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def public_name(source: str) -> str:
    """A source as others may read it: no folders of this machine.

    >>> public_name("hf://Qwen/Qwen3-0.6B@main"), public_name("/home/ann/models/mine"), public_name("package://a_b/model")
    ('Qwen/Qwen3-0.6B', 'mine', 'package://a_b/model')
    """
    if source.startswith("hf://"):
        return source.removeprefix("hf://").partition("@")[0]
    local = Path(source)
    return local.name if "://" not in source and (local.is_absolute() or source.startswith(("~", ".."))) else source


_ESCAPED = {ord(c): f"&#{ord(c)};" for c in "<>&|`[]"} | {ord(c): " " for c in "\r\n"}


def plain_text(value: str) -> str:
    """A value as text of a card: no HTML, link or line of its own.

    >>> plain_text("<b>|[a](b)")
    '&#60;b&#62;&#124;&#91;a&#93;(b)'
    """
    return value.translate(_ESCAPED)


def code(value: str) -> str:
    """A value as code in a card.

    >>> code("q_proj"), code("<script>`")
    ('`q_proj`', '<code>&#60;script&#62;&#96;</code>')
    """
    if any(c in value for c in "<>&`\r\n"):  # a code span ends at a backtick
        return f"<code>{plain_text(value)}</code>"
    return "`" + value.replace("|", r"\|") + "`"


def _facts(config: Config, result: MemberResult, base: str, classes: Sequence[str] | None, *, adapted: bool) -> dict[str, str]:
    task, training, optimizer = config.task, config.training, config.optimizer
    changed = [section.model_dump(exclude_none=True) for section in config.model.transforms]
    facts = {"base": code(base)} | ({"base transforms": code(json.dumps(changed))} if changed else {}) | {"method": config.adapter.method}
    if config.model.quantized == "keep":
        facts["base weights"] = "as quantised in its file"
    facts |= _adapter_facts(config.adapter) if adapted else {}
    facts |= {
        "trained parameters": f"{result.parameters:,}",
        "task": task.kind.replace("_", " "),
        "data": code(public_name(getattr(task, "source", task.title))),
        **({"classes": plain_text(", ".join(classes))} if classes else {}),
        "steps": f"{result.steps:,} of {training.batch_size} examples, {result.tokens:,} tokens in all",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule}, {optimizer.warmup_steps} steps of warm-up",
        "weight decay": f"{optimizer.weight_decay:g}",
        "seed": str(training.seed),
    }
    return facts | {key: code(json.dumps(_shown(key, value))) for key, value in result.settings.items() if key not in _OWN_ROWS}


def _shown(key: str, value: Any) -> Any:
    return public_name(str(value)) if key.endswith("source") else value


def _adapter_facts(adapter: AdapterConfig) -> dict[str, str]:
    """Rank, targets and so on, and the other keys of the method's section that are not at their defaults."""
    facts = {
        "rank, alpha": f"{adapter.rank}, {adapter.alpha:g}",
        "targets": code(json.dumps(adapter.targets)),
        "layers": "all" if adapter.layers is None else code(json.dumps(adapter.layers)),
        "dropout": f"{adapter.dropout:g}",
    }
    written = adapter.model_dump()
    for name, field in type(adapter).model_fields.items():
        value = written[name]
        if name not in _ALWAYS_SHOWN and value != field.get_default(call_default_factory=True):
            facts[name] = code(json.dumps(value))
    return facts
