"""Reading a compiled program's text: which collectives it has, of how many bytes, and whether they are inside a loop; which arrays."""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
        kind: such as `all-gather`.
        bytes: of its result on one device; of several arrays, where it moves them together, their sum.
        shapes: of its results.
        trips: how often it runs: 1, or the product of the trip counts of the loops around it.
        looped: whether there is a loop around it.
        line: its text.
    """

    kind: str
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    trips: int
    looped: bool
    line: str


def collectives(text: str) -> list[Collective]:
    """All collectives of `compiled.as_text()`."""
    bodies = _computations(text)
    loops: dict[str, tuple[str, int]] = {}  # computation -> who calls it, how often each time
    looping = set()
    for caller, lines in bodies.items():
        for line in lines:
            for called in re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line) if " while(" in line else None
                if " while(" in line:
                    looping.add(called)
                loops[called] = (caller, int(trips[1]) if trips else 1)

    def around(name: str) -> tuple[int, bool]:
        trips, looped = 1, False
        while name in loops:
            looped |= name in looping
            name, times = loops[name]
            trips *= times
        return trips, looped

    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if match:
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
                if match[3]:  # an asynchronous one's result holds its operands too
                    arrays, shapes = arrays[len(arrays) // 2 :], shapes[len(shapes) // 2 :]
                size = sum(_BYTES[kind] * math.prod(shape) for (kind, _), shape in zip(arrays, shapes, strict=True))
                found.append(Collective(match[2], size, shapes, *around(name), line.strip()))
    return found


def reduced_bytes(found: list[Collective]) -> int:
    """Bytes of one device that one run of the program adds up over devices."""
    return sum(c.bytes * c.trips for c in found if c.kind in ("all-reduce", "reduce-scatter"))


def float_arrays(text: str) -> set[tuple[int, ...]]:
    """Shapes of the arrays of floats that a compiled program makes: results of instructions, but for what is inside of a fusion."""
    inside, found, name = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text)), set(), ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
        made = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:f32|bf16|f16)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if made and name not in inside and made[2] not in ("parameter", "get-tuple-element", "bitcast"):
            found.add(tuple(int(n) for n in made[1].split(",") if n))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = match[1]
            bodies[name] = []
        elif line.startswith("  ") and name:
            bodies[name].append(line)
    return bodies
