"""Chat messages through a tokenizer's template, with the assistant's own tokens marked."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def encode_chat(messages: Any, tokenizer: Any, row: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant wrote it (its end-of-turn token included).

    The template is rendered up to each assistant message with its opening words (`add_generation_prompt`), and up to its end; what
    the second has more than the first is the assistant's, but for white space after the end-of-turn token: that is the template's.

    Args:
        messages: a list of `{role, content}`.
        tokenizer: with a chat template.
        row: the row's number in its file, for messages.

    Raises:
        InputError: no template, or the row is not a list of messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("task.messages: this model's tokenizer has no chat template; use 'prompt' and 'response', or another base.")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages) or not messages:
        raise InputError(f"task.messages: row {row} is not a list of messages with 'role' and 'content'.")

    def render(upto: int, opening: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=opening)
        except Exception as error:  # a template may refuse a conversation in any way it likes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise InputError(f"task.messages: the chat template refuses row {row}: {reason}") from None

    whole = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The first message has nothing before it to render: its own words are found in place.
        so_far = render(i + 1, False)
        opening = render(i, True) if i else so_far[: max(0, so_far.rfind(str(message["content"])))]
        if not whole.startswith(so_far) or not so_far.startswith(opening):
            raise InputError("task.messages: this chat template rewrites earlier messages, so the assistant's words cannot be told apart.")
        spans.append((len(opening), len(so_far.rstrip())))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, padding=False)
    wanted = [any(start <= a < end for start, end in spans) for a, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), wanted
