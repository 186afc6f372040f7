"""PEFT's `adapter_config.json`: read into typed values, and `LoraConfig`, which speaks it.

Matching follows PEFT 0.21 to the letter (`check_target_module_exists`, `get_pattern_key`): names are Hugging Face's own, from the
model's root (`bert.encoder.layer.0.attention.self.query`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from ...adapters.methods.lora import LoraSection
from ...errors import InputError
from ...weights.checkpoint import read_json
from ...weights.locations import resolve
from .options import Patterns, Reader, check_options

if TYPE_CHECKING:
    from flax import nnx


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a hub repository is asked for.
HUB_FILES = ["adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json"]


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an adapter computes, as PEFT's config says it.

    Attributes:
        raw: the JSON object, notes and all.
        rank, alpha, rslora: of modules that no pattern names; the update is scaled by alpha / rank, or alpha / sqrt(rank).
        targets, exclude: names that end a module's path, or a regular expression for the whole of it.
        parameters: 3-D parameters (expert stacks), by the end of their path.
        layers, layers_pattern: the layers that `targets` (a list) is limited to, and what the list of layers may be called.
        rank_pattern, alpha_pattern: regular expression -> value; the first that matches the end of a path decides.
        dropout, bias: while training.
        saved: modules whose own weights are in the file.
        expressions: matches its patterns.
    """

    raw: dict[str, Any]
    rank: int
    alpha: float
    rslora: bool
    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] | None
    parameters: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]
    dropout: float
    bias: str
    saved: tuple[str, ...]
    expressions: Patterns = dataclasses.field(repr=False, compare=False)

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str) -> PeftConfig:
        """Reads the JSON object of `adapter_config.json`.

        Args:
            raw: the object.
            where: the file, for messages.

        Raises:
            InputError: an option is unknown, unsupported, or of a wrong type.
        """
        check_options(raw, where)
        read = Reader(raw, where)
        pattern = raw.get("layers_pattern")
        patterns = (pattern,) if isinstance(pattern, str) and pattern else read.names("layers_pattern") or ()
        for one in patterns:
            read.expressions.check("layers_pattern", one)
        targets = read.modules("target_modules")
        parameters = read.names("target_parameters") or ()
        if not targets and not parameters:
            raise InputError(f"{where}: 'target_modules' names nothing.")
        layers = read.layers("layers_to_transform")
        if isinstance(targets, str) and (layers is not None or patterns):
            raise InputError(f"{where}: 'layers_to_transform' goes with a list of target_modules, not with a regular expression.")
        saved = read.names("modules_to_save") or ()
        for name in saved:
            read.expressions.check("modules_to_save", name)  # PEFT matches it as one when it looks for targets
        return cls(
            raw=raw,
            rank=read.whole("r", 8),
            alpha=read.number("lora_alpha", 8, lowest=1e-30),
            rslora=read.flag("use_rslora"),
            targets=targets,
            exclude=read.modules("exclude_modules"),
            parameters=parameters,
            layers=layers,
            layers_pattern=patterns,
            rank_pattern=read.patterns("rank_pattern", whole=True),
            alpha_pattern=read.patterns("alpha_pattern", whole=False),
            dropout=read.number("lora_dropout", 0.0, lowest=0.0, below=1.0),
            bias=read.choice("bias", "none", ("none", "all", "lora_only")),
            saved=saved,
            expressions=read.expressions,
        )

    def adapts(self, module: str, *, linear: bool = True, parameter: bool = False) -> bool:
        """Whether LoRA goes on a module, or a parameter.

        Args:
            module: its path from the model's root.
            linear: whether it is a linear layer other than the output head: what `all-linear` means.
            parameter: whether it is a parameter.
        """
        if parameter:
            return any(module == p or module.endswith(f".{p}") for p in self.parameters)
        if self._named(self.exclude, module) or any(
            self.expressions.match(rf"(^|.*\.){name}($|\..*)", module, whole=False) for name in self.saved
        ):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return linear
            return self.expressions.match(self.targets, module) is not None
        if self.targets is None or not self._named(self.targets, module):
            return False
        # A module that is named in full is adapted whatever the layers.
        return self.layers is None or module in self.targets or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((m for p in patterns if (m := self.expressions.match(p, module, whole=False))), None)
        return None if found is None else int(found["idx"])

    def saves(self, module: str) -> bool:
        """Whether a module's own weights are in the file. PEFT asks how its path ends, dot or no dot: `norm` saves `input_layernorm`."""
        return any(module.endswith(name) for name in self.saved)

    def size(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module."""
        rank = int(self._value(self.rank_pattern, module, self.rank))
        alpha = self._value(self.alpha_pattern, module, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _named(self, names: str | tuple[str, ...] | None, module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self.expressions.match(names, module) is not None
        return bool(names) and any(module == n or module.endswith(f".{n}") for n in names)

    def _value(self, patterns: dict[str, float], module: str, default: float) -> float:
        return next((v for p, v in patterns.items() if self.expressions.match(rf"(.*\.)?({p})$", module, whole=False)), default)


def adapter_folder(path: str | Path) -> Path:
    """The local folder of an adapter: a folder, the config in it, or `hf://org/name`.

    Raises:
        InputError: there is no such place.
    """
    found = resolve(str(path), key="adapter", hub_patterns=HUB_FILES)
    return found.parent if found.is_file() else found


def read_peft_config(path: str | Path) -> PeftConfig:
    """The config of the adapter at `path`.

    Raises:
        InputError: there is none, it is damaged, or it asks for what is not supported.
    """
    file = adapter_folder(path) / CONFIG_NAME
    return PeftConfig.parse(read_json(file, "the adapter's config"), str(file))


# What a new file says of the options that are not ours to set: PEFT's defaults.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": None,
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {},
    "revision": None, "target_modules": None, "target_parameters": None, "task_type": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip


def to_json(raw: dict[str, Any]) -> str:
    """The text of `adapter_config.json`, as PEFT writes it."""
    return json.dumps(raw, indent=2, sort_keys=True)


class LoraConfig(LoraSection):
    """`AdapterConfig` that reads and writes PEFT's config.

    >>> config = LoraConfig(rank=4, alpha=8, targets=["q_proj"])
    >>> config.to_peft()["lora_alpha"], config.to_peft()["target_modules"]
    (8, ['q_proj'])
    """

    # The file it was read from, so that what has no counterpart here (task_type, revision, ...) is there when it is written again.
    _peft: dict[str, Any] | None = PrivateAttr(None)

    @classmethod
    def from_peft(cls, path: str | Path) -> LoraConfig:
        """The config of a PEFT adapter.

        Args:
            path: its folder, the `adapter_config.json` in it, or `hf://org/name`.

        Raises:
            InputError: there is no config, it is damaged, or it has an unsupported option.
        """
        return cls.of_peft(read_peft_config(path))

    @classmethod
    def of_peft(cls, peft: PeftConfig) -> LoraConfig:
        """The same, of a config that is read already."""
        config = cls(**_ours(peft))
        config._peft = peft.raw
        return config

    def to_peft(self, model: nnx.Module | None = None) -> dict[str, Any]:
        """The contents of PEFT's `adapter_config.json`; `peft.LoraConfig(**config.to_peft())` is the same config.

        Args:
            model: the base; required if the config names layers or modules in a way that PEFT does not have (`attention`, `last:4`).

        Raises:
            InputError: a model is required, or PEFT cannot express the config.
        """
        if model is not None:
            from .save import config_for_base

            return config_for_base(model, self)
        return _theirs(self)


def _ours(peft: PeftConfig) -> dict[str, Any]:
    """The values of `AdapterConfig`."""
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
    return {
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


_PRESETS = ("attention", "mlp", "embedding", "experts", "all-linear")


def _as_regex(text: str) -> str:
    """A regular expression that no preset is called like."""
    return f"(?:{text})" if text in _PRESETS else text


def _theirs(config: LoraConfig) -> dict[str, Any]:
    """PEFT's values, where they follow from the config alone."""
    if config.method != "lora":
        raise InputError(f"adapter.method: {config.method} is no adapter; PEFT has no config for it.")
    peft = None if config._peft is None else PeftConfig.parse(config._peft, "the adapter's config")
    if peft is not None and LoraConfig(**_ours(peft)).model_dump() == config.model_dump():
        return dict(config._peft or {})
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
        **(config._peft or {}),
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
