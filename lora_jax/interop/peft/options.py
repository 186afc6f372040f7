"""What `adapter_config.json` may say (PEFT 0.21), and which of it can be had here. Nothing in it is passed over in silence.

An option is one of three things: part of what the adapter computes (`PeftConfig` has a field for it), a note that changes nothing
(kept as it is, so that it is there when the adapter is saved again), or something that is not supported, which must be off.
"""

from __future__ import annotations

import math
from typing import Any

from ...config.patterns import Patterns
from ...errors import InputError, hint

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

    def whole(self, key: str, default: int) -> int:
        """A whole number above 0."""
        value = self.raw.get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number above 0")
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
