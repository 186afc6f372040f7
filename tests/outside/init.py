"""An init outside of the library: both factors are 0 (nothing trains, and it shows)."""

from __future__ import annotations

from typing import Literal

from lora_jax import register_init
from lora_jax.adapters.inits.base import Init, InitConfig


class NothingConfig(InitConfig):
    kind: Literal["outside-nothing"] = "outside-nothing"


class Nothing(Init):
    section = NothingConfig

    def factors(self, section, site, rank, random, data):
        return {}


register_init("outside-nothing", Nothing())
