"""Policies, in a format of our own: `config.json` with their shape, and the tensors of `Policy` in safetensors.

Linear weights lie as (out, in), as PyTorch has them; convolutions as (height, width, in, out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...config.doors import FAMILIES
from ...errors import InputError
from ..policy import Policy, PolicyConfig
from .base import Family, Weight, activation, required, size

MODEL_TYPE = "actor_critic"


def _sizes(hf: Mapping[str, Any], key: str, *, least: int = 0) -> tuple[int, ...]:
    """`hf[key]`, a list of whole numbers of at least 1."""
    found = required(hf, key)
    if not isinstance(found, list) or len(found) < least:
        raise InputError(f"config.json: {key} = {found!r} should be a list of {least} or more whole numbers.")
    return tuple(size({key: n}, key) for n in found)


def _config(hf: Mapping[str, Any], dtype: Any) -> PolicyConfig:
    observation, channels = _sizes(hf, "observation_shape", least=1), _sizes({"channels": [], **hf}, "channels")
    if channels and len(observation) != 3:
        raise InputError(f"config.json: channels = {list(channels)}, but an observation has {len(observation)} axes, not 3.")
    hidden = _sizes(hf, "hidden_sizes", least=1)
    return PolicyConfig(observation, size(hf, "num_actions"), hidden, channels, activation(hf, "activation", "tanh"), dtype)


def _weights(config: PolicyConfig) -> dict[str, Weight]:
    found = {f"{name}.kernel": Weight(f"{name}.weight") for name in config.convolutions}
    found |= {f"{name}.kernel": Weight(f"{name}.weight", transpose=True) for name in config.layers}
    return found | {f"{name}.bias": Weight(f"{name}.bias") for name in (*config.convolutions, *config.layers)}


FAMILIES.register(MODEL_TYPE, Family("policy", _config, _weights, architecture="ActorCritic", heads=lambda _: {}))


def save_policy(policy: Policy, folder: Path) -> None:
    """Writes a policy as a base that `model.source` and `load_model` take; the folder is made, and its two files are replaced."""
    config = policy.config
    shape = {"observation_shape": config.observation, "num_actions": config.actions, "hidden_sizes": config.hidden}
    folder.mkdir(parents=True, exist_ok=True)
    said = {"model_type": MODEL_TYPE, **shape, "channels": config.channels, "activation": config.activation}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    tensors = {}
    for path, weight in _weights(config).items():
        module, name = path.split(".")
        array = np.asarray(getattr(getattr(policy, module), name)[...])
        tensors[weight.name] = np.ascontiguousarray(array.T if weight.transpose else array)
    save_file(tensors, folder / "model.safetensors")
