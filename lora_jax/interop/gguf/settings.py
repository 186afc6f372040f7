"""A model's shape as the metadata of a GGUF file, and the proof that a written file says the same model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gguf.constants import GGMLQuantizationType

from ...errors import InputError, warn
from ...models.decoder import Decoder, DecoderConfig
from ...models.families import find_family, gguf_architectures
from ...models.layers import LayerType
from ...models.positions import Rotary, llama3_divisors
from ...weights.checkpoint import GGUFArchitecture
from ...weights.gguf import GGUFCheckpoint
from .file import GGUFOutput


def settings_of(base: Decoder, architecture: GGUFArchitecture) -> dict[str, Any]:
    """The settings of a model, by their keys in the file.

    Raises:
        InputError: it has rotary positions that llama.cpp does not.
    """
    assert base.origin is not None
    config, block, hf = base.config, base.config.block, base.origin.config
    longest = config.positions or next((hf[key] for key in ("max_position_embeddings", "n_positions") if hf.get(key)), None)
    if longest is None:
        raise InputError("the base's config does not say how long a text may be (max_position_embeddings).")
    found: dict[str, Any] = {
        "context_length": longest,
        "embedding_length": block.width,
        "block_count": config.depth,
        "feed_forward_length": block.hidden,
        "attention.head_count": block.heads,
        "attention.head_count_kv": block.kv_heads,
        f"attention.layer_norm{'' if architecture.layer_norms else '_rms'}_epsilon": float(block.norm_eps),
        "vocab_size": config.vocab,
    }
    if block.head_dim * block.heads != block.width:
        found |= {"attention.key_length": block.head_dim, "attention.value_length": block.head_dim}
    rotary = _rotary(config)
    if rotary is not None:
        found |= {"rope.freq_base": float(rotary.theta), "rope.dimension_count": rotary.dims} | _scaling(rotary)
    found |= architecture.settings(config) if architecture.settings is not None else {}
    return {f"{architecture.name}.{key}": value for key, value in found.items()}


def _rotary(config: DecoderConfig) -> Rotary | None:
    """The rotary positions that a file's keys speak of: those of the layers that see all tokens, where there are such."""
    turned = [one for one in config.layer_types if one.rotary is not None]
    chosen = next((one for one in turned if one.window is None), turned[0] if turned else None)
    return None if chosen is None else chosen.rotary


def _scaling(rotary: Rotary) -> dict[str, Any]:
    if rotary.kind in ("default", "llama3"):
        return {}
    if rotary.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary.factor)}
    if rotary.kind == "yarn":
        found = {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rotary.factor)}
        ramp = {"rope.scaling.yarn_beta_fast": float(rotary.fast), "rope.scaling.yarn_beta_slow": float(rotary.slow)}
        usual = (rotary.fast, rotary.slow) == (32, 1)
        return found | {"rope.scaling.original_context_length": rotary.context} | ({} if usual else ramp)
    if rotary.kind == "longrope":
        return {"rope.scaling.original_context_length": rotary.context, "rope.scaling.attn_factor": float(rotary.magnitude)}
    raise InputError(f"llama.cpp has no rotary scaling '{rotary.kind}'.")


def tables_of(base: Decoder) -> dict[str, GGUFOutput]:
    """The tensors that say a rotary scaling: Llama 3's frequency divisors, or the two factors of each pair (longrope)."""
    rotary = _rotary(base.config)
    numbers: dict[str, Any] = {}
    if rotary is not None and rotary.kind == "llama3":
        numbers = {"rope_freqs.weight": llama3_divisors(rotary)}
    elif rotary is not None and rotary.kind == "longrope":
        numbers = {"rope_factors_long.weight": rotary.long, "rope_factors_short.weight": rotary.short}
    arrays = {name: np.asarray(values, np.float32) for name, values in numbers.items()}
    return {name: GGUFOutput(a.shape, GGMLQuantizationType.F32, lambda a=a: a) for name, a in arrays.items()}


def say_windows(base: Decoder, architecture: GGUFArchitecture) -> None:
    """A word where the model's attention has windows, and llama.cpp computes such models without."""
    windows = [one.window for one in base.config.layer_types if one.window is not None]
    if windows and not architecture.windows:
        warn(
            f"llama.cpp computes '{architecture.name}' models without windows of attention: in texts of more than {min(windows)} tokens"
            " its outputs will differ from this model's."
        )


def check_said(path: Path, base: Decoder, architecture: GGUFArchitecture) -> None:
    """Reads the shape of the model back from a written file.

    Raises:
        InputError: it is not the base's: GGUF files of this family cannot say what it is.
    """
    says = f"GGUF files of a {architecture.name} model cannot say what this one is"
    try:
        hf = GGUFCheckpoint(path, gguf_architectures()).config
        read = find_family(hf, str(path)).config(hf, np.dtype(base.config.block.dtype))
    except InputError as error:
        raise InputError(f"{says}: {str(error).replace(str(path), path.name)}") from None
    ours, theirs = (_normal(config, windows=architecture.windows) for config in (base.config, read))
    for name, value, other in _differences(ours, theirs):
        raise InputError(f"{says}: its {name} is {value}, and they mean {other}.")


def _normal(config: DecoderConfig, *, windows: bool) -> DecoderConfig:
    """The same with a type for every layer, without windows that are not applied."""
    types = config.layer_types if len(config.layer_types) > 1 else config.layer_types * config.depth
    kept = types if windows else tuple(LayerType(None, one.rotary) for one in types)
    return dataclasses.replace(config, layer_types=kept)


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, our value, their value) of what is not equal; floats are, as far as float32 tells them apart."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name != "dtype":
                yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{name}[{i}]")
    elif isinstance(ours, int | float) and isinstance(theirs, int | float):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            yield name, ours, theirs
    elif ours != theirs:
        yield name, ours, theirs
