"""The config's dotted keys: which there are, what each holds, and which one a wrong one was probably meant to be."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from .errors import InputError, nearest
from .schema import Config

# Names that other LoRA libraries give to what has another name here.
_ELSEWHERE_CALLED = {
    "lr": "optimizer.learning_rate",
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

# Members share one name, one run directory, one mesh and one sweep, so these cannot differ between them.
_NOT_SWEPT = ("name", "tracking", "mesh", "sweep")


def config_schema() -> dict[str, Any]:
    """The config's JSON schema, for editors and for other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **copy.deepcopy(_schema()), "title": "lora-jax config"}


def valid_keys() -> list[str]:
    """Every key that holds a value, dotted, in the order of the schema: `name`, `model.source`, ..."""
    return list(_leaves())


def section_keys() -> list[str]:
    """The keys that hold other keys: `model`, `task`, ..."""
    return list(_tree()[1])


def leaf_schema(dotted: str) -> dict[str, Any] | None:
    """What the key may hold, as JSON schema; None for a section or an unknown key."""
    return _leaves().get(dotted)


def split_key(dotted: str, *, allow_section: bool = False) -> tuple[str, ...]:
    """The path of a dotted key. Below a key that holds a mapping the rest is one name, dots and all.

    >>> split_key("adapter.rank"), split_key("adapter.rank_pattern.layers.0.q_proj")
    (('adapter', 'rank'), ('adapter', 'rank_pattern', 'layers.0.q_proj'))

    Raises:
        InputError: there is no such key; the message names the nearest.
    """
    if dotted in _leaves() or (allow_section and dotted in section_keys()):
        return tuple(dotted.split("."))
    if dotted in section_keys():
        example = next(key for key in valid_keys() if key.startswith(dotted + "."))
        raise InputError(f"'{dotted}' is a section; name a key in it, such as '{example}'.")
    for leaf, schema in _leaves().items():
        if dotted.startswith(leaf + ".") and len(dotted) > len(leaf) + 1:
            if schema.get("type") != "object":
                raise InputError(f"no config key '{dotted}': '{leaf}' holds a value, not further keys.")
            return (*leaf.split("."), dotted[len(leaf) + 1 :])
    raise InputError(unknown_key(dotted))


def unknown_key(dotted: str) -> str:
    """The sentence for a key that does not exist."""
    near = near_keys(dotted)
    if near:
        return f"no config key '{dotted}'. Did you mean " + " or ".join(f"'{key}'" for key in near) + "?"
    section = dotted.rpartition(".")[0]
    siblings = _children(section) if section in section_keys() else _children("")
    return f"no config key '{dotted}'. Valid keys here: {', '.join(siblings)}."


def near_keys(dotted: str) -> list[str]:
    """Up to three existing keys that `dotted` was probably meant to be, best first; none where nothing is near."""
    section, _, last = dotted.rpartition(".")
    if len(last) < 2 and last not in _ELSEWHERE_CALLED:
        return []  # one letter is near to everything
    if last.lower() in _ELSEWHERE_CALLED:
        return [_ELSEWHERE_CALLED[last.lower()]]
    everywhere = [*valid_keys(), *section_keys()]
    # The right name in the wrong place comes before a similar name in the right place.
    same = [key for key in everywhere if key.rpartition(".")[2] == last.lower()]
    if same:
        by_likeness = nearest(dotted, same)
        return (by_likeness + [key for key in same if key not in by_likeness])[:3]
    # Then the most similar name; of two equal names the one in the section that was meant.
    by_name = {key.rpartition(".")[2]: key for key in everywhere}
    by_name |= {name: f"{section}.{name}" if section else name for name in _children(section)}
    near = nearest(last, by_name, count=1)
    if near:
        return [by_name[near[0]]]
    return [] if not section or section in section_keys() else nearest(dotted, everywhere, count=1)


def why_not_swept(dotted: str) -> str | None:
    """Why a sweep may not vary this (existing) key; None where it may."""
    top = dotted.split(".")[0]
    if top not in _NOT_SWEPT:
        return None
    swept = sorted({key.split(".")[0] for key in valid_keys()} - set(_NOT_SWEPT))
    return f"'{dotted}' cannot be swept: the members of a sweep share it. Keys of these sections can: {', '.join(swept)}."


def _children(section: str) -> list[str]:
    """The names directly below a section ('' for the top)."""
    prefix = section + "." if section else ""
    names = [key[len(prefix) :].split(".")[0] for key in valid_keys() if key.startswith(prefix)]
    return list(dict.fromkeys(names))


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _leaves() -> dict[str, dict[str, Any]]:
    return _tree()[0]


@cache
def _tree() -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """(leaf key -> its schema, section keys), read from the JSON schema so that it is the one source of truth."""
    leaves: dict[str, dict[str, Any]] = {}
    sections: list[str] = []

    def walk(schema: dict[str, Any], prefix: str) -> None:
        for name, child in schema["properties"].items():
            # A section stands as {"$ref"}, or as anyOf [{"$ref"}, null] where it may be left out.
            refs = [option["$ref"] for option in [child, *child.get("anyOf", [])] if "$ref" in option]
            if refs:
                sections.append(prefix + name)
                walk(_schema()["$defs"][refs[0].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                leaves[prefix + name] = child

    walk(_schema(), "")
    return leaves, tuple(sections)
