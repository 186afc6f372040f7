"""PEFT's `adapter_config.json` (PEFT 0.21), read into typed values. No option is passed over in silence.

An option is one of three things: part of what the adapter computes (`PeftConfig` has a field for it), a note that changes nothing
(kept, so that it is there when the adapter is saved again), or something that is not supported, which must be off. Matching follows
PEFT to the letter (`check_target_module_exists`, `get_pattern_key`): names are Hugging Face's own, from the model's root.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.patterns import Patterns
from ...config.types import LARGEST_RANK
from ...errors import InputError, hint
from ...weights.checkpoint import read_json
from ...weights.load import resolve

# Notes: who made the adapter, for what, and how its factors were drawn. Options of other options that are off are notes as well.
NOTES = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config", "fan_in_fan_out", "init_lora_weights", "eva_config", "loftq_config", "corda_config",
    "lora_ga_config",
})  # fmt: skip

COMPUTED = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save",
})  # fmt: skip

# What has to be off, and why it cannot be on.
UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "lora_bias": "a bias beside B is not supported",
    "velora_config": "VeLoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "layer_replication": "layer replication is not supported",
    "megatron_config": "Megatron's layers are not supported",
    "trainable_token_indices": "trainable tokens are not supported; save the embedding with modules_to_save",
    "ensure_weight_tying": "tied adapters are not supported",
}

# Inits that take something out of the base's own weights: the file then belongs to a base that is nowhere stored.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

KNOWN = NOTES | COMPUTED | UNSUPPORTED.keys()


def check_options(raw: dict[str, Any], where: str) -> None:
    """`InputError` where a PEFT config asks for what is not supported or not known.

    Args:
        raw: the JSON object.
        where: the file, for messages.
    """
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r}; only adapters of type 'LORA' can be loaded.")
    for key, value in raw.items():
        if key in KNOWN and key not in UNSUPPORTED:
            continue
        if value is None or value is False or value in ([], {}):  # off; files of older and newer PEFT name options we need not know
            continue
        if key in UNSUPPORTED:
            raise InputError(f"{where}: '{key}' is set: {UNSUPPORTED[key]}.")
        raise InputError(f"{where}: the option '{key}' is not known. {hint(key, KNOWN)}".rstrip())
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None):
        raise InputError(f"{where}: 'init_lora_weights' should be true, false or a name, not {init!r}.")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise InputError(
            f"{where}: 'init_lora_weights' is '{init}', which changes the base's own weights. Save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first: it is then an ordinary LoRA."
        )
    if not isinstance(raw.get("fan_in_fan_out", False), bool):
        raise InputError(f"{where}: 'fan_in_fan_out' should be true or false.")


class Reader:
    """Takes typed values out of a JSON object, each `InputError` naming the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where, self.expressions = raw, where, Patterns(where)

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for a value that is not what was wanted."""
        shown = repr(self.raw.get(key))
        return InputError(f"{self.where}: '{key}' should be {wanted}, not {shown if len(shown) < 80 else shown[:77] + '...'}.")

    def rank(self, key: str, default: int) -> int:
        """A whole number above 0, and no larger than any model is wide."""
        value = self.raw.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST_RANK:
            raise self.wrong(key, f"a whole number from 1 to {LARGEST_RANK}")
        return value

    def number(self, key: str, default: float, *, lowest: float, below: float = math.inf) -> float:
        """A finite number."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value) or not lowest <= value < below:
            raise self.wrong(key, f"a number from {lowest:g}" + (f" to below {below:g}" if below < math.inf else " on"))
        return value  # not made a float: 16 is saved again as 16

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """One of a few words."""
        value = self.raw.get(key, default)
        if value not in choices:
            raise self.wrong(key, "one of " + ", ".join(choices))
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names, or None."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def modules(self, key: str) -> str | tuple[str, ...] | None:
        """A list of names, a regular expression, or None."""
        value = self.raw.get(key)
        if not isinstance(value, str):
            return self.names(key)
        self.expressions.check(key, value)
        return value

    def patterns(self, key: str, *, whole: bool) -> dict[str, float]:
        """Regular expression -> number above 0."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object of patterns and numbers")
        for pattern, number in value.items():
            self.expressions.check(key, pattern)
            good = type(number) is int if whole else isinstance(number, int | float) and not isinstance(number, bool)
            if whole and type(number) is int and number > LARGEST_RANK:
                raise InputError(f"{self.where}: '{key}' gives {pattern[:60]!r} a rank above {LARGEST_RANK}.")
            if not good or not _finite(number) or number <= 0:
                raise InputError(f"{self.where}: '{key}' gives {pattern[:60]!r} the value {number!r}, which is not above 0.")
        return value

    def layers(self, key: str) -> tuple[int, ...] | None:
        """Layer numbers; None where all are meant (PEFT takes an empty list so, too)."""
        value = self.raw.get(key)
        value = [value] if type(value) is int else value
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise self.wrong(key, "a layer number or a list of them")
        return tuple(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


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
            rank=read.rank("r", 8),
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

    def saves_part_of(self, module: str) -> bool:
        """Whether a module's weights are in the file, by its own name or as part of a module that is named."""
        parts = module.split(".")
        return any(self.saves(".".join(parts[:i])) for i in range(1, len(parts) + 1))

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


def option_digests(raw: Mapping[str, Any]) -> dict[str, str]:
    """Option -> digest of its value, of those that decide what an adapter computes."""
    return {key: hashlib.sha256(json.dumps(raw[key], sort_keys=True).encode()).hexdigest()[:16] for key in sorted(COMPUTED & raw.keys())}


def check_digests(raw: Mapping[str, Any], digests: Mapping[str, str], where: str) -> None:
    """`InputError` where an option is not as it was when the tensors beside it were written.

    Args:
        raw: the JSON object.
        digests: those that were kept with the tensors (`option_digests`); none of an adapter that others wrote.
        where: the file, for messages.
    """
    now = option_digests(raw)
    changed = [key for key in sorted(now.keys() | digests.keys()) if digests and now.get(key) != digests.get(key)]
    if changed:
        raise InputError(
            f"{where}: {', '.join(map(repr, changed))} is not as it was when {WEIGHTS_NAME} was written: damaged, or edited. If the change "
            "is meant, write the tensors anew, without digests: safetensors.numpy.save_file(safetensors.numpy.load_file(file), file)."
        )


# PEFT's defaults: the values of a new file for options that nothing here sets.
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
