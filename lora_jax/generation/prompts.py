"""Prompts to tokens and back: plain text, chats through the model's template, or tokens as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def encode_prompt(prompt: Prompt, tokenizer: Any, number: int = 0) -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: text; or messages `{role, content}`, put through the chat template up to where the assistant begins; or token ids.
        tokenizer: of the model; None will do for token ids.
        number: which prompt it is, for messages.

    Raises:
        InputError: it is empty, or of another kind, or there is no tokenizer or chat template for it.
    """
    if isinstance(prompt, str):
        ids = _needed(tokenizer, number)(prompt)["input_ids"]
    elif prompt and all(isinstance(part, Mapping) and {"role", "content"} <= part.keys() for part in prompt):
        text = _render(prompt, _needed(tokenizer, number), number)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif all(isinstance(part, int) or hasattr(part, "__index__") for part in prompt):
        ids = [int(part) for part in prompt]  # pyright: ignore[reportArgumentType]
    else:
        raise InputError(f"prompt {number}: neither text, nor token ids, nor messages with 'role' and 'content'.")
    if not ids:
        raise InputError(f"prompt {number}: it is empty; there is nothing to go on from.")
    return ids


def _needed(tokenizer: Any, number: int) -> Any:
    if tokenizer is None:
        raise InputError(f"prompt {number}: text needs a tokenizer (load_tokenizer); without one prompts are token ids.")
    return tokenizer


def _render(messages: Any, tokenizer: Any, number: int) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"prompt {number}: this model's tokenizer has no chat template; give the prompt as text.")
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a conversation in any way it likes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InputError(f"prompt {number}: the chat template refuses it: {reason}") from None


class TextStream:
    """Tokens of one row to the text that each adds.

    A character may be made of several tokens: what is incomplete is held back.

    Args:
        tokenizer: of the model.
        stop: tokens that are not shown.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, frozenset(stop)
        self._ids: list[int] = []
        self._start, self._end = 0, 0  # of the tokens that the last piece was made of

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add to those before."""
        self._ids += [i for i in ids if i not in self._stop]
        # A piece may depend on what stands before it (a leading space): text is compared with and without the new tokens.
        before = self._decode(self._ids[self._start : self._end])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        before, now = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        self._start = self._end = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
