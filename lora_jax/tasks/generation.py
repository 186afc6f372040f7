"""A prompt to its response."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config.doors import TASKS
from .generated import METRICS, Generated, GeneratedConfig, Names


class GenerationConfig(GeneratedConfig):
    kind: Literal["generation"] = Field(default="generation", description="The response to a prompt, scored as it is generated.")
    prompt: str = Field(description="Column of the prompts.")
    response: Names = Field(description="Column of the responses (a text each, or a list of references), or several columns.")
    metrics: list[str] = Field(default=["exact", "normalised", "token_f1"], description=METRICS)


class Generation(Generated):
    """A prompt to its response."""

    name, section = "generation", GenerationConfig

    def named(self, section: GenerationConfig) -> tuple[str, Names]:
        """`prompt` and `response`."""
        return section.prompt, section.response

    def template(self, section: GenerationConfig) -> str:
        """The prompt as it is."""
        return "{text}"


TASKS.register("generation", Generation())
