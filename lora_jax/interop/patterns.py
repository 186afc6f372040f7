"""Regular expressions from strangers: matched within a time, or refused.

`adapter_config.json` holds patterns, and one that repeats what is repeated already can keep Python's `re` busy for years. The `regex`
package reads the same language and can be told to stop.
"""

from __future__ import annotations

import re
import time

import regex

from ..config.errors import InputError

# Seconds of computing for all matches of one config's patterns; a real one takes some milliseconds.
PATIENCE = 1.0


class Patterns:
    """Matches the patterns of one file.

    Args:
        where: the file, for messages.

    >>> Patterns("here").match(r".*\\.(q|k)_proj", "layers.0.q_proj") is not None
    True
    """

    def __init__(self, where: str):
        self.where, self._left = where, PATIENCE

    def check(self, key: str, text: str) -> None:
        """`InputError` unless `text` is a regular expression."""
        try:
            re.compile(text)
            regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise InputError(f"{self.where}: '{key}' holds {text[:60]!r}, which is not a regular expression ({error}).") from None

    def match(self, pattern: str, text: str, *, whole: bool = True) -> regex.Match[str] | None:
        """`re.fullmatch`, or with `whole` False `re.match`.

        Raises:
            InputError: the patience is at its end.
        """
        began = time.process_time()
        try:
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self._left, 1e-3))
        except (TimeoutError, regex.error, RecursionError, MemoryError):
            raise InputError(
                f"{self.where}: matching {pattern[:60]!r} against the names of modules takes too long: it repeats what is repeated already."
            ) from None
        finally:
            self._left -= time.process_time() - began
