"""Only the task's head trains, a baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...config.doors import METHODS
from ...config.schema import AdapterConfig
from .base import Method


class HeadSection(AdapterConfig):
    method: Literal["head"] = Field(default="head", description="Only the task's head trains, a baseline.")


class Head(Method):
    """Only the task's head trains, a baseline."""

    name, section = "head", HeadSection


METHODS.register("head", Head())
