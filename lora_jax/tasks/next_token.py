"""What tasks share that train a decoder on the tokens of texts."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from pydantic import Field, field_validator

from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, Example
from ..data.prompts import Prompts
from ..data.tokens import DATE, template_of, writes_date
from ..errors import InputError
from ..models.encoder_decoder import Generative
from ..models.heads import LanguageModel
from .base import Base, Prediction, Task, one_or_all
from .text_metrics import token_f1

# New tokens of an answer, where no key says how many.
NEW_TOKENS = 128


class DatedConfig(TaskConfig):
    """The section of a task that may put rows through a chat template."""

    date: str = Field(
        default=DATE,
        description="The day, YYYY-MM-DD, that chat templates which write today's date get in its place: the same on every day.",
    )

    @field_validator("date")
    @classmethod
    def _date(cls, value: str) -> str:
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError(f"must be a day such as 2024-07-26, got {value!r}") from None


class NextToken(Task):
    """What tasks share that train a decoder on the tokens of texts, and ask it for the rest of one."""

    next_token = True

    def check_base(self, section: Any, base: Base, source: str) -> None:
        """It needs a decoder, or an encoder-decoder (`encode_pairs`)."""
        if not isinstance(base, Generative):
            raise InputError(f"task.kind: {self.name} needs a decoder, and {source} is an encoder.")

    def model(self, section: Any, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None) -> nnx.Module:
        """The base with its own readout."""
        assert isinstance(base, Generative)
        return LanguageModel(base)

    def scored(self, section: Any, text: str, references: Sequence[str]) -> float:
        """The score of a text that was generated, where references are known: the F1 of its words."""
        return token_f1(text, references)

    def judged(self, section: Any, prompts: Prompts, texts: Sequence[str]) -> list[Prediction]:
        """The texts, scored by `scored`."""
        made = []
        for asked, text, right in zip(prompts.inputs, texts, prompts.references, strict=True):
            made.append(Prediction(asked, text, one_or_all(right), self.scored(section, text, right) if right else None))
        return made


def notes_on(tokenizer: Any, date: str, chats: str | None) -> list[str]:
    """What a run says of a language model's tokenizer: that it has no end, or that its chat template writes a date.

    Args:
        date: the section's.
        chats: the config key of the conversations; None where there are texts.
    """
    if chats is None:
        ends = tokenizer.eos_token_id is not None
        return [] if ends else ["the tokenizer has no EOS token: the model does not learn where a text ends."]
    dated = writes_date(template_of(tokenizer, f"{chats}: no chat template."))
    return [f"the chat template writes a date: task.date = {date}, not today's."] if dated else []


def next_token(ids: Sequence[int], wanted: Sequence[bool], length: int) -> Example:
    """Tokens cut to `length`, and as target of each the next token where that one is wanted."""
    tokens = np.array(ids[:length], np.int32)
    targets = np.full(len(tokens), NO_TARGET, np.int32)
    targets[:-1] = np.where(np.array(wanted[:length], bool)[1:], tokens[1:], NO_TARGET)
    return Example(tokens, targets, cut=len(ids) > length, end_cut=any(wanted[length:]))


def with_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """A text's token ids and the token that ends it, which is not put there twice; white space may follow it in the text."""
    end: Any = tokenizer.eos_token_id
    ended = end is None or ids[-1:] == [end] or (end in ids[-4:] and text.rstrip().endswith(str(tokenizer.eos_token)))
    return ids if ended or end is None else [*ids, int(end)]
