"""The next token: of plain texts, of the responses to prompts, or of what the assistant says in chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from ..config.doors import TASKS
from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, Example
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.heads import LanguageModel
from .base import Base, Columns, Encoded, Rows, Task, TaskMetrics, plain_ids, start_ids


class CausalLMConfig(TaskConfig):
    kind: Literal["causal_lm"] = Field(default="causal_lm", description="The next token.")
    text: str | None = Field(default=None, description="Text column; the loss is on every token that follows another.")
    prompt: str | None = Field(default=None, description="Prompt column; its tokens carry no loss.")
    response: str | None = Field(default=None, description="Response column; the loss is on its tokens.")
    messages: str | None = Field(
        default=None, description="Chat-messages column: [{role, content}], through the chat template, loss on the assistant."
    )

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

    name, section = "causal_lm", CausalLMConfig

    def columns(self, section: CausalLMConfig) -> Columns:
        """Texts, prompts and responses, or messages."""
        named = (section.text, section.prompt, section.response, section.messages)
        return Columns(tuple(n for n in named if n is not None), structured=() if section.messages is None else (section.messages,))

    def metrics(self, section: CausalLMConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The mean loss of a token; reports show it as perplexity."""
        # Chosen by the loss, not by its exponential, which may be infinite.
        return TaskMetrics(("loss", "perplexity", "token_accuracy"), "loss", "perplexity", training=("perplexity",))

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
            texts = plain_ids(tokenizer, rows.columns[section.text])
            whole = [[*start, *_with_end(ids, tokenizer)][: section.max_length] if ids else [] for ids in texts]
            return Encoded([next_token(ids, [True] * len(ids), len(ids)) for ids in whole])
        if section.messages is not None:
            chats = zip(rows.columns[section.messages], rows.numbers, strict=True)
            return Encoded([next_token(*encode_chat(m, tokenizer, int(n)), section.max_length) for m, n in chats])
        prompts, responses = (plain_ids(tokenizer, rows.columns[str(name)]) for name in (section.prompt, section.response))
        made = []
        for prompt, response in zip(prompts, responses, strict=True):
            answer = _with_end(response, tokenizer)
            asked = [*start, *prompt]
            made.append(next_token([*asked, *answer], [False] * len(asked) + [True] * len(answer), section.max_length))
        return Encoded(made)


TASKS.register("causal_lm", CausalLM())


def next_token(ids: Sequence[int], wanted: Sequence[bool], length: int) -> Example:
    """Tokens cut to `length`, and as target of each the next token where that one is wanted."""
    tokens = np.array(ids[:length], np.int32)
    targets = np.full(len(tokens), NO_TARGET, np.int32)
    targets[:-1] = np.where(np.array(wanted[:length], bool)[1:], tokens[1:], NO_TARGET)
    return Example(tokens, targets)


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    return [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
