"""A text to its summary."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config.doors import TASKS
from .generated import METRICS, Generated, GeneratedConfig, Names


class SummarisationConfig(GeneratedConfig):
    kind: Literal["summarisation"] = Field(default="summarisation", description="The summary of a text.")
    text: str = Field(description="Column of the texts.")
    target: Names = Field(description="Column of the summaries (a text each, or a list of references), or several columns.")
    metrics: list[str] = Field(default=["rougeL", "rouge1", "rouge2", "rougeLsum"], description=METRICS)


class Summarisation(Generated):
    """A text to its summary."""

    name, section = "summarisation", SummarisationConfig

    def named(self, section: SummarisationConfig) -> tuple[str, Names]:
        """`text` and `target`."""
        return section.text, section.target

    def template(self, section: SummarisationConfig) -> str:
        """What is wanted stands behind the text, where a model goes on."""
        return "{text}\n\nSummary:"


TASKS.register("summarisation", Summarisation())
