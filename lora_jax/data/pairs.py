"""Source and target as an encoder-decoder takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .batching import Example


def source_ids(text: str, tokenizer: Any, where: str) -> list[int]:
    """The tokens of one source, its special tokens among them.

    Args:
        text: the source.
        tokenizer: of the model.
        where: names the text, for messages.

    Raises:
        InputError: half of a character stands in it.
    """
    from ..weights.tokenizer import check_text  # on use: it imports tokenizers, which a process that only renders chats does not need

    return list(tokenizer(check_text(text, where), padding=False)["input_ids"])


def target_ids(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of targets, with what the tokenizer puts around them: an end (always, where it has one), the code of a language."""
    found, end = tokenizer(text_target=[str(t) for t in texts], padding=False)["input_ids"], tokenizer.eos_token_id
    return [ids if end is None or end in ids[-2:] else [*ids, end] for ids in found]


@dataclasses.dataclass(frozen=True)
class Shift:
    """How targets are given to a decoder, which predicts each of their tokens from those before.

    Attributes:
        start: the token that stands before every target; None: the last token of each stands before it (mBART's code of the language).
    """

    start: int | None

    def __call__(self, target: Sequence[int]) -> list[int]:
        """The decoder's tokens for a target.

        >>> Shift(0)([5, 6, 1]), Shift(None)([5, 1, 9])
        ([0, 5, 6], [9, 5, 1])
        """
        before = target[-1:] if self.start is None else [self.start]
        return [*before, *target[:-1]]


def source_target(source: Sequence[int], target: Sequence[int], shift: Shift, length: int, *, cut: bool = False) -> Example:
    """A source, and the target that is to be predicted of it.

    Args:
        source: token ids, cut already where they have to be (`tokens.encoder_texts`).
        target: token ids, with what ends them.
        shift: how the decoder is given the target.
        length: to which the target is cut.
        cut: whether the source was.
    """
    targets, fed = (np.array(ids[:length], np.int32) for ids in (target, shift(target)))
    short = len(target) > length
    return Example(np.array(source, np.int32), targets, decoder_tokens=fed, cut=cut or short, end_cut=short)
