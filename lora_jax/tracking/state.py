"""`state.json`: what a run has decided, so that it resumes with the same packs, in the same modes, after the same rungs.

Processes that train parts of one sweep share the file. Each change is a read, an edit and an atomic write under a lock, so none is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import InputError
from .files import read_json, turn, write_json

STATE = "state.json"


@dataclass
class Split:
    """A pack, by its members' names, that goes on as several."""

    pack: list[str]
    parts: list[list[str]]
    why: str


@dataclass
class Rungs:
    """Successive halving so far: who races, the steps of all rungs, and who went on after each rung that was reached."""

    members: list[str]
    steps: list[int]
    kept: list[list[str]] = field(default_factory=list)


@dataclass
class RunState:
    """The contents of `state.json`.

    Attributes:
        plan: stage of halving (one without halving) -> packs -> names of their members.
        splits: packs that were split, in that order.
        halving: the rungs; None without halving.
        members: every member that the run trains or has trained, name -> swept dotted key -> value. A member keeps the name that it was
            given first, whatever keys a later sweep of this run has.
        identity: member -> part (`IDENTITY`) -> digest of what it was trained and judged on.
        execution: id of a pack (`RunDirectory.pack_id`) -> how it runs its members (`packing.choice.Choice`). The id, not what the
            pack has in common with others, is the key: it stays the same when a later version adds config keys.
        summary: figures of the whole run: `compiled_programs`, `packs`, `seconds`, and `data`, what became of the rows.
        dropped: sections that were damaged and are empty now; not written.
    """

    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    identity: dict[str, dict[str, str]] = field(default_factory=dict)
    plan: list[list[list[str]]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    halving: Rungs | None = None
    execution: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


_SECTIONS: dict[str, TypeAdapter[Any]] = {
    "members": TypeAdapter(dict[str, dict[str, Any]]),
    "identity": TypeAdapter(dict[str, dict[str, str]]),
    "plan": TypeAdapter(list[list[list[str]]]),
    "splits": TypeAdapter(list[Split]),
    "halving": TypeAdapter(Rungs | None),
    "execution": TypeAdapter(dict[str, dict[str, Any]]),
    "summary": TypeAdapter(dict[str, Any]),
}
# A run can decide these again. Splits and rungs say where members are, and only the user can give that up.
_MADE_AGAIN = ("members", "plan", "execution", "summary")
_ADVICE = "Remove the file to plan anew (packs that have a checkpoint go on from it), or start over with --fresh."


# What a run presumes beside its config. `code` is told of and not refused: runs of older versions go on.
IDENTITY = {
    "base": "the base (model.source has other weights)",
    "tokenizer": "the tokenizer or its chat template",
    "train": "task data: other training rows",
    "held_out": "task data: other held-out rows",
    "test": "task data: other test rows",
    "shared": "the model that the task computes with (other weights)",
    "code": "the version of lora-jax",
}


def check_identity(where: str, then: dict[str, str], now: dict[str, str]) -> str | None:
    """Compares what members were trained on with what is there now, in the parts that both have.

    Args:
        where: what was trained, for messages.
        then: its parts.
        now: today's.

    Returns:
        What is to be told of a difference that does not forbid to go on.

    Raises:
        InputError: something else is there now.
    """
    unlike = [part for part in IDENTITY if part in then and part in now and then[part] != now[part]]
    if changed := [IDENTITY[part] for part in unlike if part != "code"]:
        advice = "Put back what was there, give another 'name=', or start over with --fresh."
        raise InputError(f"{where} was trained on something else than is there now. What changed: {'; '.join(changed)}. {advice}")
    return f"{where} was trained by {then['code']}; this is {now['code']}." if unlike else None


def read_state(folder: Path) -> RunState:
    """The state of a run directory; an empty one where nothing was decided yet.

    A damaged plan, execution or summary is left out and named in `dropped`.

    Raises:
        InputError: the file is not JSON, or its splits or rungs are damaged.
    """
    path = folder / STATE
    if not path.exists():
        return _from_earlier_files(folder)
    try:
        facts = read_json(path)
    except InputError as error:
        raise InputError(f"{error}. {_ADVICE}") from None
    return _checked(facts, {name: path for name in _SECTIONS})


def update_state(folder: Path, change: Callable[[RunState], None]) -> RunState:
    """Applies `change` to the state of a run directory, writes it and returns it. Processes take turns."""
    with turn(folder):
        state = read_state(folder)
        change(state)
        facts = asdict(state)
        del facts["dropped"]
        write_json(folder / STATE, {"format": 1, **facts})
    return state


def _checked(facts: dict[str, Any], sources: dict[str, Path]) -> RunState:
    state = RunState()
    for name, section in _SECTIONS.items():
        if name not in facts:
            continue
        try:
            setattr(state, name, section.validate_python(facts[name]))
        except ValidationError:
            if name not in _MADE_AGAIN:
                raise InputError(f"{sources[name]}: '{name}' is damaged. {_ADVICE}") from None
            state.dropped.append(name)
    return state


def _from_earlier_files(folder: Path) -> RunState:
    """The state of a run of before `state.json`, which kept it in five kinds of files. They stay, and are not read once it is written."""
    sources = {"plan": "plan.json", "splits": "pieces.json", "halving": "halving.json", "summary": "summary.json"}
    paths = {name: folder / file for name, file in sources.items()} | {"execution": folder / "checkpoints"}
    facts: dict[str, Any] = {}
    for name in sources:
        try:
            found = read_json(paths[name]) if paths[name].exists() else None
        except InputError:
            if name not in _MADE_AGAIN:
                raise
            found = {}
        if found is None:
            continue
        if name == "plan":
            facts[name] = found.get("stages")
        elif name == "splits":
            cuts: Any = found.get("cuts")
            valid = isinstance(cuts, list) and all(isinstance(cut, dict) for cut in cuts)
            facts[name] = [{"parts": cut.get("pieces"), **cut} for cut in cuts] if valid else cuts
        else:
            facts[name] = found
    for file in sorted(paths["execution"].glob("*/mode.json")):
        try:
            facts.setdefault("execution", {})[file.parent.name] = read_json(file)
        except InputError:
            continue  # this pack chooses anew
    return _checked(facts, paths)
