"""Regular expressions from configs and from other people's files, matched within bounds of length and time.

A pattern with nested repetition can keep Python's `re` busy for years. The `regex` package reads the same language and takes a timeout.
"""

from __future__ import annotations

import re
import time

import regex

from ..errors import InputError

LONGEST = 10_000  # characters of a pattern
TIMEOUT = 1.0  # seconds for all matches of one file's patterns, and a millisecond for each after that; real ones take milliseconds


class Patterns:
    """Matches the patterns of one file.

    Args:
        where: the file or the config key, for messages.

    >>> Patterns("here").match(r".*\\.(q|k)_proj", "layers.0.q_proj") is not None
    True
    """

    def __init__(self, where: str):
        self.where, self._left = where, TIMEOUT

    def check(self, key: str, text: str) -> None:
        """`InputError` unless `text` is a regular expression of at most `LONGEST` characters."""
        if len(text) > LONGEST:
            raise InputError(f"{self.where}: '{key}' holds a regular expression of {len(text):,} characters; the most is {LONGEST:,}.")
        try:
            re.compile(text)
            regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise InputError(f"{self.where}: '{key}' holds {text[:60]!r}, which is not a regular expression ({error}).") from None

    def match(self, pattern: str, text: str, *, whole: bool = True) -> regex.Match[str] | None:
        """`re.fullmatch`, or with `whole` False `re.match`.

        Raises:
            InputError: the time is used up.
        """
        began = time.process_time()
        try:
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self._left, 1e-3))
        except (TimeoutError, regex.error, RecursionError, MemoryError):
            raise InputError(
                f"{self.where}: matching {pattern[:60]!r} against the names of modules takes too long: it nests repetitions."
            ) from None
        finally:
            self._left -= time.process_time() - began


def fullmatch(pattern: str, text: str, where: str) -> bool:
    """Whether a pattern matches the whole text, within `TIMEOUT`; `InputError` names `where`."""
    return Patterns(where).match(pattern, text) is not None


def parse_layers(layers: int | str | list[int], depth: int) -> set[int]:
    """The layers a config names: an index (negative from the top), a list, `2-5`, `first:2`, `last:4`, or these joined by commas.

    >>> sorted(parse_layers("0, last:2", 6))
    [0, 4, 5]

    Raises:
        InputError: there is no such layer, or no such form.
    """
    if isinstance(layers, int):
        return {_layer(layers, depth)}
    if not isinstance(layers, str):
        return {_layer(layer, depth) for layer in layers}
    found: set[int] = set()
    for part in (p.strip() for p in layers.split(",")):
        if re.search(r"\d{10}", part):  # no number is counted up to before it is known to be a layer
            raise InputError(f"adapter.layers: '{part[:40]}': the model has layers 0 to {depth - 1}.")
        if match := re.fullmatch(r"(first|last):(\d+)", part):
            count = int(match[2])
            if not 0 < count <= depth:
                raise InputError(f"adapter.layers: '{part}' of {depth} layers.")
            found |= set(range(count)) if match[1] == "first" else set(range(depth - count, depth))
        elif match := re.fullmatch(r"(\d+)-(\d+)", part):
            first, last = (_layer(int(end), depth) for end in match.groups())
            if first > last:
                raise InputError(f"adapter.layers: '{part}' goes down; write the lower layer first.")
            found |= set(range(first, last + 1))
        elif re.fullmatch(r"-?\d+", part):
            found.add(_layer(int(part), depth))
        else:
            raise InputError(f"adapter.layers: cannot read '{part[:40]}'. Write an index, 2-5, first:2 or last:4.")
    return found


def _layer(layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise InputError(f"adapter.layers: there is no layer {layer}; the model has layers 0 to {depth - 1}.")
    return layer % depth
