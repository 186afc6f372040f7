"""The two kinds of failure a user sees, and the nearest-choice hint.

`InputError` is what the user can mend by editing a config, a path or a file: commands print it and exit with 2.
`RunError` is what went wrong while running: commands print it and exit with 1. Neither shows a traceback. `Stopped` is no failure.
"""

from __future__ import annotations

import difflib
import errno
import re
import warnings
from collections.abc import Iterable

_LONGEST = 4000  # characters of a message


class InputError(ValueError):
    """Bad input. The message names the file and key, what was wrong, and the nearest valid choice. What is longer than a screen is cut.

    >>> len(str(InputError("no column '" + "x" * 100_000 + "'. Columns: text.")))
    148
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST:
            message = re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", message)
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")


class Stopped(BaseException):
    """A run was told to stop and did, after `step` steps of a pack, with everything saved; `signal` says what told it (SIGTERM, SIGINT).

    No `Exception`, as KeyboardInterrupt is none: what handles failures of files, templates or callbacks must not take it for one.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.signal = 15


class RunError(RuntimeError):
    """A failure at run time that is not the input's fault."""


class OutOfMemory(RunError):
    """A program that does not fit into the memory it may take."""


class InputWarning(UserWarning):
    """Something of an input is left out, overridden or taken in one of several senses. Commands print it on stderr."""


def warn(text: str) -> None:
    """Says an `InputWarning`; the same text is said once."""
    warnings.warn(text, InputWarning, stacklevel=3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failure was for want of memory, found by us or by the device."""
    return isinstance(error, (OutOfMemory, MemoryError)) or ("RESOURCE_EXHAUSTED" in str(error) and not is_disk_full(error))


def is_disk_full(error: BaseException) -> bool:
    """Whether a failure was for want of room on a disk; TensorStore says so in a ValueError, as `RESOURCE_EXHAUSTED`.

    >>> is_disk_full(ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"))
    True
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in ("No space left on device", "Disk quota exceeded", "ENOSPC"))


def nearest(word: str, choices: Iterable[str], *, count: int = 3) -> list[str]:
    """The up to `count` choices that look most like `word`, best first.

    >>> nearest("lerning_rate", ["learning_rate", "weight_decay"])
    ['learning_rate']
    """
    choices = list(choices)
    by_lower = {c.lower(): c for c in choices}
    return [by_lower[m] for m in difflib.get_close_matches(word.lower(), by_lower, n=count, cutoff=0.5)]


def nearest_numbers(wanted: int, choices: Iterable[int]) -> str:
    """A sentence that names the next smaller and the next larger of some numbers; that there is none, where there is none.

    >>> nearest_numbers(10, [1, 2, 4, 8, 16])
    'Nearest: 8 and 16.'
    """
    numbers = sorted(choices)
    near = [n for n in numbers if n <= wanted][-1:] + [n for n in numbers if n > wanted][:1]
    return f"Nearest: {' and '.join(map(str, near))}." if near else "No size does."


def hint(word: str, choices: Iterable[str]) -> str:
    """A sentence to end a message with: the nearest choice, or all of them where none is near and they are few.

    >>> hint("linaer", ["linear", "cosine"])
    "Did you mean 'linear'?"
    """
    choices = list(choices)
    near = nearest(word, choices)
    if near:
        return "Did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    if 0 < len(choices) <= 20:
        return "Valid choices: " + ", ".join(choices) + "."
    return ""
