"""The next token: of plain texts, of the responses to prompts, or of what the assistant says in chats."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ..config.doors import TASKS
from ..data.pairs import Shift, source_target, target_ids
from ..data.prompts import Prompts
from ..data.tokens import encode_chat, encoder_texts, messages_of, plain_ids, prompt_ids, start_ids, with_start
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.encoder_decoder import EncoderDecoder
from ..models.heads import LanguageModel
from .base import Base, Columns, Encoded, Rows, TaskData, TaskMetrics
from .next_token import NEW_TOKENS, DatedConfig, NextToken, next_token, notes_on, with_end
from .teachers import DistillConfig, Taught


class CausalLMConfig(DatedConfig):
    kind: Literal["causal_lm"] = Field(default="causal_lm", description="The next token.")
    text: str | None = Field(default=None, description="Text column; the loss is on every token that follows another.")
    prompt: str | None = Field(default=None, description="Prompt column; its tokens carry no loss.")
    response: str | None = Field(default=None, description="Response column; the loss is on its tokens.")
    messages: str | None = Field(
        default=None, description="Chat-messages column: [{role, content}], through the chat template, loss on the assistant."
    )
    distill: DistillConfig | None = Field(default=None, description="A teacher whose logits are met beside the right tokens.")

    @model_validator(mode="after")
    def _columns(self) -> CausalLMConfig:
        ways = [self.text is not None, self.prompt is not None or self.response is not None, self.messages is not None]
        if sum(ways) != 1:
            raise ValueError("causal_lm needs exactly one of: 'text', 'prompt' with 'response', 'messages'")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("'prompt' and 'response' go together")
        return self


class CausalLM(Taught, NextToken):
    """The next token."""

    name, section = "causal_lm", CausalLMConfig
    by_row = True

    def columns(self, section: CausalLMConfig) -> Columns:
        """Texts, prompts and responses, or messages."""
        named = (section.text, section.prompt, section.response, section.messages)
        messages, response = ((n,) if n is not None else () for n in (section.messages, section.response))
        return Columns(tuple(n for n in named if n is not None), structured=messages, unknown=response)

    def metrics(self, section: CausalLMConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The mean loss of a token; reports show it as perplexity."""
        # Chosen by the loss, not by its exponential, which may be infinite.
        # While there is a teacher, the loss of a training step is no token's.
        training = ("perplexity",) if section.distill is None else ()
        return TaskMetrics(("loss", "perplexity", "token_accuracy"), "loss", "perplexity", training=training)

    def notes(self, section: CausalLMConfig, tokenizer: Any) -> list[str]:
        """A tokenizer without an end; the date that a chat template writes."""
        return notes_on(tokenizer, section.date, "task.messages" if section.messages is not None else None)

    def teacher_model(self, section: CausalLMConfig, teacher: Any, data: TaskData) -> Any:
        """The teacher with its own readout."""
        if not isinstance(teacher, Decoder):
            raise InputError(f"task.distill.teacher: {section.distill and section.distill.teacher} is no decoder, and says no next token.")
        return LanguageModel(teacher)

    def check_base(self, section: CausalLMConfig, base: Base, source: str) -> None:
        """It needs a decoder, or for prompts and responses an encoder-decoder."""
        super().check_base(section, base, source)
        if isinstance(base, EncoderDecoder) and section.prompt is None:
            raise InputError(f"task.prompt: {source} is an encoder-decoder, and learns responses to prompts alone.")

    def prompts(self, section: CausalLMConfig, rows: Rows, tokenizer: Any) -> Prompts:
        """The prompt, for the response; the text, for how it goes on; a chat without the assistant's last turn, for that turn."""
        if section.messages is None:
            texts = rows.columns[section.text or str(section.prompt)]
            tokens = [with_start(ids, start_ids(tokenizer)) for ids in plain_ids(tokenizer, texts)]
            right = [()] * len(texts) if section.response is None else [(response,) for response in rows.columns[section.response]]
        else:
            tokens, texts, right = [], [], []
            for said, n in zip(rows.columns[section.messages], rows.numbers, strict=True):
                messages = messages_of(said, where := f"task.messages: row {n}")
                last = messages.pop() if messages[-1]["role"] == "assistant" and len(messages) > 1 else None
                tokens.append(prompt_ids(messages, tokenizer, where, section.date))
                texts.append("\n".join(f"{message['role']}: {message['content']}" for message in messages))
                right.append(() if last is None else (last["content"],))
        for ids, n in zip(tokens, rows.numbers, strict=True):
            if not ids:
                raise InputError(f"row {n} of {rows.source} is empty: there is nothing to go on from.")
        return Prompts([np.array(ids, np.int32) for ids in tokens], list(texts), right, NEW_TOKENS)

    def encode(self, section: CausalLMConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """As target of each token the next one, where that carries a loss."""
        start = start_ids(tokenizer)
        if section.text is not None:
            # A blank text teaches nothing, not even where it ends.
            texts = rows.columns[section.text]
            found = zip(texts, plain_ids(tokenizer, texts), strict=True)
            whole = [with_start(with_end(ids, text, tokenizer), start) if ids else [] for text, ids in found]
            return Encoded([next_token(ids, [True] * len(ids), section.max_length) for ids in whole])
        if section.messages is not None:
            rows_of = zip(rows.columns[section.messages], rows.numbers, strict=True)
            chats = [encode_chat(messages, tokenizer, int(n), section.date) for messages, n in rows_of]
            made = [next_token(chat.ids, chat.wanted, section.max_length) for chat in chats]
            return Encoded(made, turns_left_out=sum(chat.left_out for chat in chats))
        asked, answers = (rows.columns[str(name)] for name in (section.prompt, section.response))
        made = []
        for prompt, response, text in zip(plain_ids(tokenizer, asked), plain_ids(tokenizer, answers), answers, strict=True):
            answer, before = with_end(response, text, tokenizer), with_start(prompt, start)
            made.append(next_token([*before, *answer], [False] * len(before) + [True] * len(answer), section.max_length))
        return Encoded(made)

    def encode_pairs(self, section: CausalLMConfig, rows: Rows, tokenizer: Any, *, shift: Shift) -> Encoded:
        """The prompt is read, and each token of the response is a target."""
        length = section.max_length
        read = encoder_texts(tokenizer, rows.columns[str(section.prompt)], length)
        told = target_ids(tokenizer, rows.columns[str(section.response)])
        made = [source_target(ids, target, shift, length, cut=cut) for (ids, cut), target in zip(read, told, strict=True)]
        return Encoded(made)

    def source_prompts(self, section: CausalLMConfig, rows: Rows, tokenizer: Any) -> Prompts:
        """The prompt, for the response."""
        asked, answers = (rows.columns[str(name)] for name in (section.prompt, section.response))
        tokens = [np.array(ids, np.int32) for ids, _ in encoder_texts(tokenizer, asked, section.max_length)]
        return Prompts(tokens, list(asked), [(answer,) for answer in answers], NEW_TOKENS)


TASKS.register("causal_lm", CausalLM())
