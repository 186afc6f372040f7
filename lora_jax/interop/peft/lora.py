"""LoRA in PEFT's files: its config values, the names and axes of its tensors, and its scale.

`load` and `save` know nothing else of the method: another method needs these functions and no more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from ...adapters.methods.base import AdaptedSite
from ...adapters.methods.lora import LoraSection
from ...adapters.sites import KINDS, PRESETS
from ...errors import InputError, hint, warn
from .config import DEFAULTS, KNOWN, PeftConfig
from .names import ROOT, Module

_PRESETS = (*PRESETS, *KINDS)

# The config


def section_of(peft: PeftConfig) -> LoraSection:
    """The adapter section that asks for what a PEFT config does."""
    targets: Any = (
        peft.targets if isinstance(peft.targets, str) else [*(peft.targets or ()), *(p.removesuffix(".weight") for p in peft.parameters)]
    )
    layers: Any = None
    if isinstance(targets, str):
        targets = "all-linear" if targets.lower() == "all-linear" else _as_regex(targets)
    elif peft.layers is not None and peft.layers_pattern:
        names, lists = ("|".join(n) for n in ([re.escape(t) for t in targets], peft.layers_pattern))
        targets = rf"(?:.*\.)?(?:{lists})\.(?:{'|'.join(map(str, peft.layers))})\.(?:.*\.)?(?:{names})"
    elif peft.layers is not None:
        layers = list(peft.layers)
    exclude: Any = _as_regex(peft.exclude) if isinstance(peft.exclude, str) else list(peft.exclude or ()) or None
    values: dict[str, Any] = {
        "rank": peft.rank,
        "alpha": peft.alpha,
        "targets": targets,
        "exclude": exclude,
        "layers": layers,
        "rank_pattern": {p: int(v) for p, v in peft.rank_pattern.items()},
        "alpha_pattern": peft.alpha_pattern,
        "rslora": peft.rslora,
        "dropout": peft.dropout,
        "bias": peft.bias,
        "modules_to_save": list(peft.saved),
    }
    return LoraSection(**values)


# PEFT's word -> ours, of what can be said in both.
_PEFT_WORDS = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "exclude_modules": "exclude", "lora_dropout": "dropout",
    "use_rslora": "rslora", "layers_to_transform": "layers",
}  # fmt: skip


def in_our_words(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values with PEFT's words for ours.

    Raises:
        InputError: a key is given in both words, or PEFT knows it and `LoraConfig` does not.
    """
    found = {}
    for key, value in values.items():
        own = _PEFT_WORDS.get(key, key)
        if own in found or (own != key and own in values):
            raise InputError(f"LoraConfig: '{own}' is given twice: {key} is PEFT's name for it.")
        if own == key and key not in LoraSection.model_fields:
            if key in KNOWN:
                raise InputError(
                    f"LoraConfig: '{key}' is an option of PEFT's LoraConfig that this one does not have. LoraConfig.from_peft reads PEFT's "
                    f"files. Keys: {', '.join(LoraSection.model_fields)}."
                )
            raise InputError(f"LoraConfig: there is no key '{key}'. {hint(key, [*LoraSection.model_fields, *_PEFT_WORDS])}".rstrip())
        found[own] = sorted(value) if own in ("targets", "exclude") and isinstance(value, set) else value
    said = [key for key in values if key in _PEFT_WORDS]
    if said and "alpha" not in found:
        default = LoraSection.model_fields["alpha"].default
        warn(f"LoraConfig: alpha is {default:g} where lora_alpha is not given; PEFT's default is {DEFAULTS['lora_alpha']}.")
    return found


def wrong_values(error: ValidationError) -> InputError:
    """What a section's values have wrong, in a line each."""
    lines = [
        f"LoraConfig: '{'.'.join(map(str, e['loc']))}': {e['msg']}, not {str(e['input'])[:60]!r}." for e in error.errors(include_url=False)
    ]
    return InputError("\n".join(lines))


def section_of_record(text: str) -> LoraSection | None:
    """The section in a model's record (`adapters/inject.py`), JSON; None where it is that of another method."""
    raw = json.loads(text)
    return LoraSection.model_validate(raw) if raw["method"] == LoraSection.model_fields["method"].default else None


def _as_regex(text: str) -> str:
    """A regular expression that is not the name of a preset."""
    return f"(?:{text})" if text in _PRESETS else text


def config_values(config: LoraSection, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    """PEFT's config of an adapter section, where it follows from the section alone.

    Args:
        config: the section.
        raw: the PEFT config that it was read from: returned as it is where it still says the same, and the source of the values that
            have no key here (`task_type`, `revision`, ...).

    Raises:
        InputError: it names layers or modules in a way that PEFT does not (`attention`, `last:4`), which takes the model.
    """
    if raw is not None and section_of(PeftConfig.parse(raw, "the adapter's config")).model_dump() == config.model_dump():
        return dict(raw)
    for key in ("targets", "exclude"):
        value = getattr(config, key)
        if value in _PRESETS and not (key == "targets" and value == "all-linear"):
            raise InputError(f"adapter.{key}: which modules '{value}' means depends on the model; give it: to_peft(model).")
    if isinstance(config.layers, str) or (config.layers is not None and isinstance(config.targets, str)):
        raise InputError(f"adapter.layers: which layers {config.layers!r} means depends on the model; give it: to_peft(model).")
    layers = [config.layers] if isinstance(config.layers, int) else config.layers
    if layers is not None and min(layers) < 0:
        raise InputError(f"adapter.layers: which layers {layers} means depends on the model; give it: to_peft(model).")
    return {
        **DEFAULTS,
        **(raw or {}),
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "target_modules": config.targets,
        "exclude_modules": config.exclude,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {p: plain(a) for p, a in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save or None,
    }


def plain(value: float) -> float:
    """A whole number without its `.0`, as people write it."""
    return int(value) if float(value).is_integer() else value


def alpha_of(scale: np.float32, rank: int, *, rslora: bool) -> float:
    """The alpha of a scale, alpha / rank or alpha / sqrt(rank): the shortest number that gives it bit for bit, 16 and not 15.999999."""
    root = math.sqrt(rank) if rslora else rank
    exact = float(scale) * root
    rounded: Iterable[float] = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((a for a in rounded if np.float32(a / root) == scale), exact)


# The tensors


# The parameters of a mixture's module, in its order.
_EXPERTS = ("gate_up_proj", "down_proj")


def factor_keys(module: Module, adapted: Collection[str]) -> tuple[str, str]:
    """The names of a module's A and B in a file.

    Args:
        module: what bears them.
        adapted: names of all that bear some: of two parameters in one module the later is wrapped around the earlier.
    """
    owner, _, own = module.name.rpartition(".")
    stem = ROOT + (owner if module.parameter else module.name)
    if module.site.kind == "expert":
        stem += ".base_layer" * sum(f"{owner}.{later}" in adapted for later in _EXPERTS[_EXPERTS.index(own) + 1 :])
    if module.site.kind == "embedding":
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def to_file(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors (..., inputs, rank) and (..., rank, outputs) as PEFT's files hold them: A (rank, inputs) and B (outputs, rank).

    Of experts A is (experts * rank, inputs) with an expert's ranks together, and B (outputs, rank * experts) with a rank's experts
    together.
    """
    if a.ndim == 2:
        return a.T, b.T
    return a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)


def from_file(a: np.ndarray, b: np.ndarray, experts: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What `to_file` takes, of what it gives."""
    if experts is None:
        return a.T, b.T
    return a.reshape(experts, -1, a.shape[1]).swapaxes(1, 2), b.reshape(len(b), -1, experts).transpose(2, 1, 0)


def module_of_key(key: str) -> str | None:
    """The module that a tensor of the file belongs to; None where it is not an A."""
    for ending in (".lora_A.weight", ".lora_embedding_A"):
        if key.startswith(ROOT) and key.endswith(ending):
            return key[len(ROOT) : -len(ending)]
    return None


def factor_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a module's A and B in a file, (rank, inputs) and (outputs, rank); of experts their ranks together."""
    total = rank * (module.site.experts or 1)
    return (total, module.site.inputs), (module.site.outputs, total)


# The site's module


@dataclasses.dataclass
class Factors:
    """What a site's module holds, layers in front; one layer where it is not stacked.

    Attributes:
        a, b: (layers, inputs, rank) and (layers, rank, outputs) float32, with padding; of experts with an axis of them after the layers.
        scale: (layers,) float32.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, module: AdaptedSite) -> Factors:
        """Copied from a module.

        Raises:
            InputError: its method has no low-rank form.
        """
        found = module.method.low_rank(module)
        if found is None:
            raise InputError(f"'{module.method.name}' adapters have no low-rank form.")
        a, b, scale = (np.array(jax.device_get(array)) for array in found)
        return cls(a, b, scale) if scale.ndim else cls(a[None], b[None], scale[None])

    def used_rank(self, layer: int) -> int:
        """The smallest rank that holds all of a layer's numbers that are not 0."""
        a, b = self.a[layer], self.b[layer]
        used = np.abs(a).reshape(-1, a.shape[-1]).sum(0) + np.abs(b).sum(-1).reshape(-1, b.shape[-2]).sum(0) > 0
        return int(np.flatnonzero(used)[-1]) + 1 if used.any() else 1

    def put(self, module: AdaptedSite) -> None:
        """Writes them into a module."""
        arrays = module.method.of_low_rank(self.a, self.b, self.scale)
        assert arrays is not None
        module.fill(arrays)
