"""Regular expressions from configs and from other people's files, matched within bounds of length and time.

A pattern with nested repetition can keep Python's `re` busy for years. The `regex` package reads the same language and takes a timeout.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Collection

import regex

from ..errors import InputError, hint

LONGEST = 10_000  # characters of a pattern
LARGEST = 200_000  # characters of a pattern with its counted repetitions written out: what compiling one takes memory for
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
        """`InputError` unless `text` is a regular expression within the bounds."""
        if (why := what_is_wrong(text)) is not None:
            raise InputError(f"{self.where}: '{key}' holds {text[:60]!r}, which {why}.")

    def match(self, pattern: str, text: str, *, whole: bool = True) -> regex.Match[str] | None:
        """`re.fullmatch`, or with `whole` False `re.match`.

        Raises:
            InputError: the time is used up, or the pattern is too large to compile.
        """
        if (why := _too_large(pattern)) is not None:
            raise InputError(f"{self.where}: {pattern[:60]!r} {why}.")
        began = time.process_time()
        try:
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self._left, 1e-3))
        except (TimeoutError, regex.error, RecursionError, MemoryError):
            raise InputError(
                f"{self.where}: matching {pattern[:60]!r} against the names of modules takes too long: it nests repetitions."
            ) from None
        finally:
            self._left -= time.process_time() - began


def what_is_wrong(text: str) -> str | None:
    """What is wrong with a regular expression: its size, which is looked at before anything is compiled, or its form. None: nothing."""
    if (why := _too_large(text)) is not None:
        return why
    try:
        re.compile(text)
        regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is not a regular expression: {error}"
    return None


@functools.lru_cache(1024)
def _too_large(text: str) -> str | None:
    """What is wrong with the size of a pattern; None where it is within bounds. Nothing is compiled for it."""
    if len(text) > LONGEST:
        return f"is a regular expression of {len(text):,} characters; the most is {LONGEST:,}"
    size = len(text)
    for inner in re.findall(r"\{([^{}]*)\}?", re.sub(r"\\.", "", text, flags=re.DOTALL)):
        if not (count := re.fullmatch(r"(\d{0,6}),?(\d{0,6})", inner)):
            return f"holds {{{inner[:20]}}}, which is no count such as {{2}} or {{1,3}}"  # to the package `regex` it means other things
        # As if every repetition stood in every other: simple, and patterns for names of modules hardly repeat.
        size *= max(1, *(int(n or 1) for n in count.groups()))
    return f"repeats itself into {size:.1g} characters; the most is {LARGEST:,}" if size > LARGEST else None


def fullmatch(pattern: str, text: str, where: str) -> bool:
    """Whether a pattern matches the whole text, within `TIMEOUT`; `InputError` names `where`."""
    return Patterns(where).match(pattern, text) is not None


# `encoder:last:2` of a model with several stacks.
_OF_STACK = re.compile(r"(?!first:|last:)([A-Za-z_][\w.]*):\s*(.+)")


def layers_of(layers: int | str | list[int], name: str, known: Collection[str]) -> int | str | list[int]:
    """The parts of `adapter.layers` that are for one stack: those that name it, and those that name none.

    Args:
        layers: as the config has it.
        name: of the stack.
        known: of all stacks of the model; none where it has one.

    Raises:
        InputError: it names a stack that is none of the model's.

    >>> layers_of("encoder:last:2, 0", "encoder", ["decoder", "encoder"])
    'last:2,0'
    >>> layers_of("encoder:last:2, decoder:0", "decoder", ["decoder", "encoder"])
    '0'
    """
    if not isinstance(layers, str):
        return layers
    own = []
    for part in (p.strip() for p in layers.split(",")):
        match = _OF_STACK.fullmatch(part)
        if match is not None and match[1] not in known:
            shown = f"{hint(match[1], known)} Stacks: {', '.join(known)}." if known else "The model has one stack: write the layers alone."
            raise InputError(f"adapter.layers: there is no stack '{match[1]}'. {shown}")
        if match is None or match[1] == name:
            own.append(part if match is None else match[2])
    return ",".join(own) if own else []


def parse_layers(layers: int | str | list[int], depth: int, of: str = "the model") -> set[int]:
    """The layers a config names: an index (negative from the top), a list, `2-5`, `first:2`, `last:4`, `all`, or these joined by commas.

    Args:
        layers: as the config has it, without names of stacks (`layers_of`).
        depth: how many layers there are.
        of: what has them, for messages.

    >>> sorted(parse_layers("0, last:2", 6))
    [0, 4, 5]

    Raises:
        InputError: there is no such layer, or no such form.
    """
    if isinstance(layers, int):
        return {_layer(layers, depth, of)}
    if not isinstance(layers, str):
        return {_layer(layer, depth, of) for layer in layers}
    found: set[int] = set()
    for part in (p.strip() for p in layers.split(",")):
        if re.search(r"\d{10}", part):  # no number is counted up to before it is known to be a layer
            raise InputError(f"adapter.layers: '{part[:40]}': {of} has layers 0 to {depth - 1}.")
        if part == "all":
            found |= set(range(depth))
            continue
        if match := re.fullmatch(r"(first|last):(\d+)", part):
            count = int(match[2])
            if not 0 < count <= depth:
                raise InputError(f"adapter.layers: '{part}' asks for {count} layers, but {of} has {depth}.")
            found |= set(range(count)) if match[1] == "first" else set(range(depth - count, depth))
        elif match := re.fullmatch(r"(\d+)-(\d+)", part):
            first, last = (_layer(int(end), depth, of) for end in match.groups())
            if first > last:
                raise InputError(f"adapter.layers: '{part}' goes down; write the lower layer first.")
            found |= set(range(first, last + 1))
        elif re.fullmatch(r"-?\d+", part):
            found.add(_layer(int(part), depth, of))
        else:
            raise InputError(f"adapter.layers: cannot read '{part[:40]}'. Write an index, 2-5, first:2 or last:4.")
    return found


def _layer(layer: int, depth: int, of: str) -> int:
    if not -depth <= layer < depth:
        raise InputError(f"adapter.layers: there is no layer {layer}; {of} has layers 0 to {depth - 1}.")
    return layer % depth
