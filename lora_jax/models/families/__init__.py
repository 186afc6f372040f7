"""One small file a family: how its Hugging Face config and weight names translate. No family has code of its own in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...config.errors import InputError, hint


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter comes from: a Hugging Face tensor name, `{i}` standing for the layer.

    `transpose` turns PyTorch's (out, in) into our (in, out).
    """

    name: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`.

    Attributes:
        kind: `encoder` or `decoder`.
        config: Hugging Face config and dtype -> `EncoderConfig` or `DecoderConfig`.
        weights: our config -> {parameter path: Weight}. In a path `layers.` stands for the stack.
        prefixes: what may stand before the names in a checkpoint (`bert.` where it was saved with a head).
        ignored: endings of tensor names that a checkpoint may hold and we have no use for.
    """

    kind: str
    config: Callable[[Mapping[str, Any], Any], Any]
    weights: Callable[[Any], dict[str, Weight]]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()


def families() -> dict[str, Family]:
    """`model_type` -> family, of all that are known."""
    from . import bert, llama

    return {"bert": bert.FAMILY, "llama": llama.FAMILY}


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a Hugging Face config; `InputError` lists the known ones."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families():
        raise InputError(f"{where}: model_type '{kind}' is not supported. {hint(str(kind), families())} Known: {', '.join(families())}.")
    return families()[kind]


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`; `InputError` where it is missing."""
    if config.get(key) is None:
        raise InputError(f"config.json: no '{key}'.")
    return config[key]


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """`InputError` where `config` has `key` with a value that is not supported."""
    if key in config and config[key] not in allowed:
        raise InputError(f"config.json: {key} = {config[key]!r} is not supported (only {', '.join(map(repr, allowed))}).")


def projections(names: Mapping[str, str], *, bias: bool) -> dict[str, Weight]:
    """Kernel (transposed) and bias of linear layers: our module path -> Hugging Face module path."""
    table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose=True) for ours, theirs in names.items()}
    if bias:
        table |= {f"{ours}.bias": Weight(f"{theirs}.bias") for ours, theirs in names.items()}
    return table
