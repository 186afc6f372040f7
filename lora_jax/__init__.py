"""LoRA for any Flax NNX model: a sweep over ranks and layers is one compiled program over one frozen base.

Names are imported on first use, so that `import lora_jax` takes no time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.bank import AdapterBank as AdapterBank
    from .adapters.describe import describe as describe
    from .adapters.inject import inject as inject
    from .adapters.members import inject_members as inject_members
    from .adapters.merge import merge as merge
    from .adapters.merge import unmerge as unmerge
    from .adapters.mixed import with_rows as with_rows
    from .adapters.parameters import AdapterParam
    from .adapters.partition import partition as partition
    from .config.doors import register_exporter as register_exporter
    from .config.doors import register_family as register_family
    from .config.doors import register_init as register_init
    from .config.doors import register_method as register_method
    from .config.doors import register_optimizer as register_optimizer
    from .config.doors import register_task as register_task
    from .config.doors import register_transform as register_transform
    from .config.load import load_config as load_config
    from .config.schema import Config as Config
    from .errors import InputError as InputError
    from .errors import RunError as RunError
    from .generation.generate import Generator as Generator
    from .generation.generate import generate as generate
    from .interop.hf import save_pretrained as save_pretrained
    from .interop.peft.load import load_peft as load_peft
    from .interop.peft.lora import LoraConfig as LoraConfig
    from .interop.peft.save import save_peft as save_peft
    from .models.load import load_model as load_model
    from .sweeps.run import fit as fit
    from .sweeps.run import sweep as sweep
    from .training.statistics import calibrate as calibrate
    from .weights.tokenizer import load_tokenizer as load_tokenizer

    LoRAParam = AdapterParam
    __version__: str

_NAMES = {
    "AdapterBank": "adapters.bank",
    "Config": "config.schema",
    "Generator": "generation.generate",
    "InputError": "errors",
    "LoRAParam": "adapters.parameters:AdapterParam",
    "LoraConfig": "interop.peft.lora",
    "RunError": "errors",
    "calibrate": "training.statistics",
    "describe": "adapters.describe",
    "fit": "sweeps.run",
    "generate": "generation.generate",
    "inject": "adapters.inject",
    "inject_members": "adapters.members",
    "load_config": "config.load",
    "load_model": "models.load",
    "load_peft": "interop.peft.load",
    "load_tokenizer": "weights.tokenizer",
    "merge": "adapters.merge",
    "partition": "adapters.partition",
    "register_exporter": "config.doors",
    "register_family": "config.doors",
    "register_init": "config.doors",
    "register_method": "config.doors",
    "register_optimizer": "config.doors",
    "register_task": "config.doors",
    "register_transform": "config.doors",
    "save_peft": "interop.peft.save",
    "save_pretrained": "interop.hf",
    "sweep": "sweeps.run",
    "unmerge": "adapters.merge",
    "with_rows": "adapters.mixed",
}

__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("lora-jax")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError("lora_jax is on the path, but not installed: it has no version") from None
    if name not in _NAMES:
        raise AttributeError(f"module 'lora_jax' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(f"lora_jax.{module}"), attribute or name)


def __dir__() -> list[str]:
    return list(__all__)
