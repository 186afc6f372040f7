"""Full fine-tuning, a baseline: every weight of the base trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...config.doors import METHODS
from ...config.schema import AdapterConfig
from .base import Method


class FullSection(AdapterConfig):
    method: Literal["full"] = Field(default="full", description="Full fine-tuning, a baseline: every weight of the base trains.")


class Full(Method):
    """Full fine-tuning, a baseline: every weight of the base trains."""

    name, section = "full", FullSection


METHODS.register("full", Full())
