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
