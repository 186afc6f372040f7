"""Where a base came from: enough to find its files again and to name its parameters as they were named there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint a base was loaded from.

    Attributes:
        source: as it was given to `load_model`.
        text: the checkpoint's Hugging Face config, as JSON: a model's structure holds what can be compared and hashed.
        prefix: what stands before the family's tensor names in that checkpoint (`bert.` where it was saved with a head).
    """

    source: str
    text: str
    prefix: str

    @classmethod
    def of(cls, source: str, config: Mapping[str, Any], prefix: str) -> Origin:
        """From the config as a dict."""
        return cls(source, json.dumps(config, sort_keys=True), prefix)

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's Hugging Face config."""
        return json.loads(self.text)

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        return self.config["model_type"]
