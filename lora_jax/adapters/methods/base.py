"""What a method says of itself; one file each beside this one."""

from __future__ import annotations

from typing import Any

from ...config.schema import AdapterConfig


class Method:
    """A way to adapt a base.

    Attributes:
        name: as `adapter.method` says it.
        section: its config section.
    """

    name: str
    section: type[AdapterConfig]

    def configured(self, config: AdapterConfig) -> Any:
        """The config as this method's section, with its keys' defaults where it was given without them."""
        return config if isinstance(config, self.section) else self.section.model_validate(config.model_dump())
