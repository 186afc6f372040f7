"""What a model is asked to go on from, and how a text is shortened so that there is room for what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .tokens import plain_ids


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows of which a model generates the rest.

    Attributes:
        tokens: a (length,) int32 array for each.
        inputs: what each was made of, for a person to read.
        references: for each the texts that are right; none where they are not known.
        max_new_tokens: the largest number of tokens that follow.
        temperature, top_p: how they are chosen (`generation/sampling.py`); greedily by default.
        seed: row i samples with seed + i.
    """

    tokens: list[np.ndarray]
    inputs: list[str]
    references: list[tuple[str, ...]]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def shortened(texts: Sequence[str], tokenizer: Any, room: int) -> tuple[list[str], list[bool]]:
    """The texts, each without what is beyond its first `room` tokens, and which of them were cut.

    Args:
        tokenizer: a transformers fast tokenizer.
        room: tokens; at least 1.
    """
    lengths = [len(ids) for ids in plain_ids(tokenizer, texts)]
    kept, cut = list(texts), [length > room for length in lengths]
    if long := [i for i, is_cut in enumerate(cut) if is_cut]:
        spans = tokenizer([texts[i] for i in long], add_special_tokens=False, return_offsets_mapping=True, padding=False)["offset_mapping"]
        for i, own in zip(long, spans, strict=True):
            kept[i] = texts[i][: own[room - 1][1]].rstrip()
    return kept, cut
