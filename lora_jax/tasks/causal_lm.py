"""The next token: of plain texts, of the responses to prompts, or of what the assistant says in chats."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from pydantic import Field, field_validator, model_validator

from ..config.doors import TASKS
from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, Example
from ..data.tokens import DATE, encode_chat, plain_ids, start_ids, template_of, with_start, writes_date
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.heads import LanguageModel
from .base import Base, Columns, Encoded, Rows, Task, TaskMetrics


class CausalLMConfig(TaskConfig):
    kind: Literal["causal_lm"] = Field(default="causal_lm", description="The next token.")
    text: str | None = Field(default=None, description="Text column; the loss is on every token that follows another.")
    prompt: str | None = Field(default=None, description="Prompt column; its tokens carry no loss.")
    response: str | None = Field(default=None, description="Response column; the loss is on its tokens.")
    messages: str | None = Field(
        default=None, description="Chat-messages column: [{role, content}], through the chat template, loss on the assistant."
    )

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

    @model_validator(mode="after")
    def _columns(self) -> CausalLMConfig:
        ways = [self.text is not None, self.prompt is not None or self.response is not None, self.messages is not None]
        if sum(ways) != 1:
            raise ValueError("causal_lm needs exactly one of: 'text', 'prompt' with 'response', 'messages'")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("'prompt' and 'response' go together")
        return self


class CausalLM(Task):
    """The next token."""

    name, section, next_token = "causal_lm", CausalLMConfig, True

    def columns(self, section: CausalLMConfig) -> Columns:
        """Texts, prompts and responses, or messages."""
        named = (section.text, section.prompt, section.response, section.messages)
        return Columns(tuple(n for n in named if n is not None), structured=() if section.messages is None else (section.messages,))

    def metrics(self, section: CausalLMConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The mean loss of a token; reports show it as perplexity."""
        # Chosen by the loss, not by its exponential, which may be infinite.
        return TaskMetrics(("loss", "perplexity", "token_accuracy"), "loss", "perplexity", training=("perplexity",))

    def notes(self, section: CausalLMConfig, tokenizer: Any) -> list[str]:
        """A tokenizer without an end; the date that a chat template writes."""
        if section.messages is None:
            ends = tokenizer.eos_token_id is not None
            return [] if ends else ["the tokenizer has no EOS token: the model does not learn where a text ends."]
        dated = writes_date(template_of(tokenizer, "task.messages: no chat template."))
        return [f"the chat template writes a date: task.date = {section.date}, not today's."] if dated else []

    def check_base(self, section: CausalLMConfig, base: Base, source: str) -> None:
        """It needs a decoder."""
        if not isinstance(base, Decoder):
            raise InputError(f"task.kind: {self.name} needs a decoder, and {source} is an encoder.")

    def model(
        self, section: CausalLMConfig, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None
    ) -> nnx.Module:
        """The decoder with its own readout."""
        assert isinstance(base, Decoder)
        return LanguageModel(base)

    def encode(self, section: CausalLMConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """As target of each token the next one, where that carries a loss."""
        start = start_ids(tokenizer)
        if section.text is not None:
            # A blank text teaches nothing, not even where it ends.
            texts = rows.columns[section.text]
            found = zip(texts, plain_ids(tokenizer, texts), strict=True)
            whole = [with_start(_with_end(ids, text, tokenizer), start) if ids else [] for text, ids in found]
            return Encoded([next_token(ids, [True] * len(ids), section.max_length) for ids in whole])
        if section.messages is not None:
            rows_of = zip(rows.columns[section.messages], rows.numbers, strict=True)
            chats = [encode_chat(messages, tokenizer, int(n), section.date) for messages, n in rows_of]
            made = [next_token(chat.ids, chat.wanted, section.max_length) for chat in chats]
            return Encoded(made, turns_left_out=sum(chat.left_out for chat in chats))
        asked, answers = (rows.columns[str(name)] for name in (section.prompt, section.response))
        made = []
        for prompt, response, text in zip(plain_ids(tokenizer, asked), plain_ids(tokenizer, answers), answers, strict=True):
            answer, before = _with_end(response, text, tokenizer), with_start(prompt, start)
            made.append(next_token([*before, *answer], [False] * len(before) + [True] * len(answer), section.max_length))
        return Encoded(made)


TASKS.register("causal_lm", CausalLM())


def next_token(ids: Sequence[int], wanted: Sequence[bool], length: int) -> Example:
    """Tokens cut to `length`, and as target of each the next token where that one is wanted."""
    tokens = np.array(ids[:length], np.int32)
    targets = np.full(len(tokens), NO_TARGET, np.int32)
    targets[:-1] = np.where(np.array(wanted[:length], bool)[1:], tokens[1:], NO_TARGET)
    return Example(tokens, targets, cut=len(ids) > length, end_cut=any(wanted[length:]))


def _with_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """A text's token ids and the token that ends it, which is not put there twice; white space may follow it in the text."""
    end: Any = tokenizer.eos_token_id
    ended = end is None or ids[-1:] == [end] or (end in ids[-4:] and text.rstrip().endswith(str(tokenizer.eos_token)))
    return ids if ended or end is None else [*ids, int(end)]
