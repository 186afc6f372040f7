"""LoRA for any Flax NNX model: a sweep over ranks and layers is one compiled program over one frozen base.

Names are loaded when they are first used, so that `import lora_jax` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.bank import AdapterBank as AdapterBank
    from .adapters.describe import describe as describe
    from .adapters.inject import inject as inject
    from .adapters.merge import merge as merge
    from .adapters.merge import unmerge as unmerge
    from .adapters.mixed import with_rows as with_rows
    from .adapters.partition import partition as partition
    from .config.errors import InputError as InputError
    from .config.errors import RunError as RunError
    from .config.load import load_config as load_config
    from .config.schema import Config as Config
    from .interop.hf_writing import save_pretrained as save_pretrained
    from .interop.peft_config import LoraConfig as LoraConfig
    from .interop.peft_loading import load_peft as load_peft
    from .interop.peft_writing import save_peft as save_peft
    from .models.loading import load_model as load_model
    from .models.tokenizer import load_tokenizer as load_tokenizer
    from .sweeps.api import fit as fit
    from .sweeps.api import sweep as sweep
    from .training.generate import Generator as Generator
    from .training.generate import generate as generate

_NAMES = {
    "AdapterBank": "adapters.bank",
    "Config": "config.schema",
    "Generator": "training.generate",
    "InputError": "config.errors",
    "LoraConfig": "interop.peft_config",
    "RunError": "config.errors",
    "describe": "adapters.describe",
    "fit": "sweeps.api",
    "generate": "training.generate",
    "inject": "adapters.inject",
    "load_config": "config.load",
    "load_model": "models.loading",
    "load_peft": "interop.peft_loading",
    "load_tokenizer": "models.tokenizer",
    "merge": "adapters.merge",
    "partition": "adapters.partition",
    "save_peft": "interop.peft_writing",
    "save_pretrained": "interop.hf_writing",
    "sweep": "sweeps.api",
    "unmerge": "adapters.merge",
    "with_rows": "adapters.mixed",
}

__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lora_jax' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(f"lora_jax.{module}"), attribute or name)


def __dir__() -> list[str]:
    return list(__all__)
