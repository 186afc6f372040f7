"""A batch of prompts while it is decoded, and what is to be computed anew on its way.

Where the frequencies of rotary positions change with the length of the rows (`Decoder.borders`: longrope, as Phi-3 has it), keys kept
from before the border are turned by the wrong ones. So the step that takes the longest row past it is not one more token with the
cache, but all rows so far run as if they were prompts. The length of the longest row alone decides, padding not counted, and for all
rows together, as in transformers: rotary positions go by the largest one of a batch.
"""

from __future__ import annotations

import numpy as np

from .decoding import Choice, Decoding


class Continuation:
    """Prompts and what follows them.

    Args:
        decoding: of the models.
        tokens, mask, choice, method, room, total: of `Decoding.start`; the mask as NumPy array.
    """

    def __init__(self, decoding: Decoding, tokens: np.ndarray, mask: np.ndarray, choice: Choice, method: str, room: int, total: int):
        self._decoding, self._tokens, self._mask = decoding, tokens, mask
        self._choice, self._method, self._total = choice, method, total
        self._longest = int(mask.sum(1).max())
        self._ahead = [border for border in decoding.borders if border >= self._longest]
        self._decoded = decoding.start(tokens, mask, choice, method, room, total)

    @property
    def tokens(self) -> np.ndarray:
        """The new tokens so far, (rows, room) int32, with members (members, rows, room); padding beyond."""
        return np.asarray(self._decoded.tokens)

    @property
    def ended(self) -> bool:
        """Whether all rows have ended, of all members."""
        return bool(np.all(self._decoded.done))

    def advance(self, count: int) -> None:
        """Goes on until there are `count` new tokens, or all rows have ended."""
        # The last of the new tokens has no key yet: so many tokens after the longest prompt fill the cache up to a border.
        while self._ahead and (full := self._ahead[0] - self._longest + 1) < count:
            self._to(full)
            if self.ended:
                return
            length = self._ahead.pop(0) + 1
            self._decoded = self._decoding.again(self._decoded, self._tokens, self._mask, self._choice, self._method, length, self._total)
        self._to(count)

    def _to(self, count: int) -> None:
        self._decoded = self._decoding.advance(self._decoded, self._choice, count, self._method)
