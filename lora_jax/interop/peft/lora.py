"""`LoraConfig`, LoRA's section for Python's users: it reads and writes PEFT's config, and takes PEFT's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx
from pydantic import PrivateAttr, ValidationError

from ...adapters.inits.base import of_peft
from ...adapters.inject import inject
from ...adapters.methods.base import method_of
from ...adapters.methods.lora import LoraForm, LoraSection
from ...config.doors import INITS
from ...errors import InputError, hint, warn
from .config import GENERAL, config_values, read_peft_config
from .save import config_of_model

_FORM = LoraForm()
# PEFT's word -> ours, of what can be said in both.
_WORDS = {theirs: ours for ours, theirs in _FORM.words.items() if ours != theirs} | {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "init_lora_weights": "init",
}
_KNOWN = GENERAL.keys() | _FORM.defaults.keys() | _FORM.notes | {"peft_type"}


class LoraConfig(LoraSection):
    """LoRA's config section, which reads and writes PEFT's config. PEFT's words (`r`, `lora_alpha`, `target_modules`, ...) are taken too.

    Raises:
        InputError: there is no such key, or a value will not do.

    >>> config = LoraConfig(rank=4, alpha=8, targets=["q_proj"])
    >>> config.to_peft()["lora_alpha"], config.to_peft()["target_modules"]
    (8, ['q_proj'])
    """

    # The file that it was read from: what has no key here (task_type, revision, ...) is written again.
    _peft: dict[str, Any] | None = PrivateAttr(None)

    def __init__(self, **values: Any):
        try:
            super().__init__(**_in_our_words(values))
        except ValidationError as error:
            raise _wrong_values(error) from None

    @classmethod
    def from_peft(cls, path: str | Path) -> LoraConfig:
        """The config of a PEFT adapter.

        Args:
            path: its folder, the `adapter_config.json` in it, or `hf://org/name`.

        Raises:
            InputError: there is no config, it is damaged, it has an unsupported option, or it is another method's.
        """
        peft = read_peft_config(path)
        if not isinstance(peft.section, LoraSection):
            raise InputError(f"{path}: the adapter's method is '{peft.method.name}', not LoRA. load_peft(base, folder) loads it.")
        config = cls(**peft.section.model_dump())
        config._peft = peft.raw
        return config

    def to_peft(self, model: nnx.Module | None = None) -> dict[str, Any]:
        """The contents of PEFT's `adapter_config.json`; `peft.LoraConfig(**config.to_peft())` is the same config.

        Args:
            model: the base; required if the config names layers or modules in a way that PEFT does not have (`attention`, `last:4`).

        Raises:
            InputError: a model is required, or PEFT cannot express the config.
        """
        if model is None:
            return config_values(method_of(self), self, self._peft)
        return config_of_model(inject(model, self, rngs=nnx.Rngs(0)))


def _in_our_words(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values with PEFT's words for ours.

    Raises:
        InputError: a key is given in both words, or PEFT knows it and `LoraConfig` does not.
    """
    found = {}
    for key, value in values.items():
        own = _WORDS.get(key, key)
        if own in found or (own != key and own in values):
            raise InputError(f"LoraConfig: '{own}' is given twice: {key} is PEFT's name for it.")
        if own == key and key not in LoraSection.model_fields:
            if key in _KNOWN:
                raise InputError(
                    f"LoraConfig: '{key}' is an option of PEFT's LoraConfig that this one does not have. LoraConfig.from_peft reads PEFT's "
                    f"files. Keys: {', '.join(LoraSection.model_fields)}."
                )
            raise InputError(f"LoraConfig: there is no key '{key}'. {hint(key, [*LoraSection.model_fields, *_WORDS])}".rstrip())
        if key == "init_lora_weights":
            if (meant := of_peft(value)) is None:
                raise InputError(f"LoraConfig: init_lora_weights: {value!r} is no init here. {hint(str(value), INITS)}".rstrip())
            value = meant
        found[own] = sorted(value) if own in ("targets", "exclude") and isinstance(value, set) else value
    said = [key for key in values if key in _WORDS]
    if said and "alpha" not in found:
        default = LoraSection.model_fields["alpha"].default
        warn(f"LoraConfig: alpha is {default:g} where lora_alpha is not given; PEFT's default is {_FORM.defaults['lora_alpha']}.")
    return found


def _wrong_values(error: ValidationError) -> InputError:
    """What a section's values have wrong, in a line each."""
    lines = [
        f"LoraConfig: '{'.'.join(map(str, e['loc']))}': {e['msg']}, not {str(e['input'])[:60]!r}." for e in error.errors(include_url=False)
    ]
    return InputError("\n".join(lines))
