"""Other names of config keys: those of earlier versions, which are read as today's with a note, and those of other libraries."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .yaml import Path

# Names that other LoRA libraries give to what has another name here.
ELSEWHERE_CALLED = {
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.kind",
    "wd": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_norm",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_rslora": "adapter.rslora",
    "target_modules": "adapter.targets",
    "exclude_modules": "adapter.exclude",
    "layers_to_transform": "adapter.layers",
    "loraplus_lr_ratio": "optimizer.b_lr_ratio",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "max_seq_length": "task.max_length",
    "model_name_or_path": "model.source",
}

# Key of an earlier version -> the same key today.
RENAMED = {
    "training.cache_prefix": "training.cache_trunk",
    "training.cache_memory_gb": "training.trunk_memory_gb",
    "training.cache_disk_gb": "training.trunk_disk_gb",
}
_noted: set[str] = set()


def current_name(dotted: str) -> str:
    """A key's name today; that of a renamed one is printed, once a process.

    >>> current_name("adapter.rank")
    'adapter.rank'
    """
    new = RENAMED.get(dotted)
    if new is None:
        return dotted
    if dotted not in _noted:
        _noted.add(dotted)
        print(f"note: the config key {dotted} is called {new} now.", file=sys.stderr)
    return new


def renamed(data: Mapping[str, Any], file: str, origins: dict[Path, str]) -> dict[str, Any]:
    """A copy of a config's plain values with the names that keys have today, in its sections and among its swept keys.

    Args:
        data: the values.
        file: where they come from, for messages.
        origins: where each path came from; follows the new names.

    Raises:
        InputError: a key is given by both names.
    """
    data = copy.deepcopy(dict(data))
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        values, after = data.get(section), new.partition(".")[2]
        if isinstance(values, dict) and name in values:
            if after in values:
                raise InputError(f"{file}: '{old}' is the earlier name of '{new}'; give one of them.")
            current_name(old)
            data[section] = {after if key == name else key: value for key, value in values.items()}
            if (section, name) in origins:
                origins[section, after] = origins.pop((section, name))
    sweep = data.get("sweep")
    if isinstance(sweep, dict):
        random = sweep.get("random")
        swept = [sweep.get("grid"), sweep.get("zip"), sweep.get("reference"), random.get("keys") if isinstance(random, dict) else None]
        members = sweep.get("members")
        for keys in [*swept, *(members if isinstance(members, list) else ())]:
            for old in [key for key in keys if key in RENAMED] if isinstance(keys, dict) else ():
                keys[current_name(old)] = keys.pop(old)
    return data
