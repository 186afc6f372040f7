"""Checkpoints of a pack half-way: everything that a resumed run needs to end with the bits it would have had. Never the base.

    <folder>/<step>/arrays/          Orbax: trainable arrays, optimizer state, who is alive, what members keep of their start
                    checkpoint.json  step, members, the base's fingerprint, the loop's own numbers, a digest of every file
    <folder>/best-<step>/            the same for the best arrays so far, written when an evaluation was better

The data's position and all random numbers follow from the config's seeds and the step. Arrays are written as they lie on the
mesh, each process its own part, and read onto whatever mesh asks for them. A folder appears under its name when it is complete;
a half-written one has another name and is removed by the next run. `checkpointer` is Orbax's, as one process or several use it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ..adapters.partition import Arrays
from ..data.batching import DATA_ORDER
from ..errors import InputError
from ..parallel.processes import process_count
from .step import MemberState

_FORMAT = 1
_FACTS = "checkpoint.json"


class Saved(NamedTuple):
    """A checkpoint read back.

    Attributes:
        step: steps done.
        state: of the members.
        best: their best arrays; None before the first evaluation.
        loop: the loop's own numbers.
        kept: the members' own arrays that do not train.
    """

    step: int
    state: MemberState
    best: Arrays | None
    loop: dict[str, Any]
    kept: Arrays = {}  # noqa: RUF012 - never changed in place


class PackCheckpoints:
    """The checkpoints of one pack, written by a thread while training goes on.

    Args:
        folder: theirs alone.
        members: names of the pack's members, in order.
        fingerprint: of the base the arrays belong to.
        keep: how many of the newest are kept; more than one, so that a damaged one has a predecessor.
        order: number of the order that the batches have the examples in (`BatchPlan.order`).
        warn: told in words of what went wrong and how it was met.
    """

    def __init__(
        self, folder: Path, members: Sequence[str], fingerprint: str, *, keep: int, warn: Callable[[str], None], order: int = DATA_ORDER
    ):
        self.folder = folder.resolve()
        self._members, self._fingerprint, self._keep, self._warn = list(members), fingerprint, keep, warn
        self._order = order
        self._writes = jax.process_index() == 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future[None] | None = None
        self._best: str | None = None
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part"):
                shutil.rmtree(part, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdecimal())

    def save_best(self, step: int, best: Arrays) -> None:
        """Keeps the best arrays so far beside the checkpoints from here on; they were found at `step`."""
        self._best = f"best-{step}"
        self._submit(self._best, dict(best), {"step": step})

    def save(self, step: int, state: MemberState, loop: dict[str, Any], kept: Arrays | None = None) -> None:
        """Starts writing a checkpoint and returns; waits first if the one before is still being written.

        Args:
            step: steps done.
            state: the members' state; may be donated at once.
            loop: JSON values: what the loop itself remembers.
            kept: the members' own arrays that do not train.
        """
        self._submit(str(step), _named(state) | _marked(kept or {}), {"step": step, "loop": loop, "best": self._best})

    def wait(self) -> None:
        """Returns when everything is on the disk. A failure, such as a full disk, is a warning: what was there before still is."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except Exception as error:
            newest = f"the newest is of step {self.steps[-1]}" if self.steps else "there is none yet"
            self._warn(f"a checkpoint could not be written ({reason(error)}); {newest}. Training goes on.")
        self._pending = None

    def close(self) -> None:
        """Waits for the last and ends the thread."""
        self.wait()
        self._thread.shutdown()

    def restore(self, state: MemberState, kept: Arrays | None = None) -> Saved | None:
        """The newest whole checkpoint, on the shapes and shardings of `state` and `kept`; None where there is none.

        A damaged one is told of and passed over.

        Raises:
            InputError: it belongs to another base, to other members, or to a version with another order of the data.
        """
        for step in reversed(self.steps):
            try:
                facts = self._facts(str(step))
                named = self._arrays(str(step), _named(state) | _marked(kept or {}))
                best = None
                if facts["best"] is not None:
                    self._facts(facts["best"])
                    best = self._arrays(facts["best"], state.trainable)
            except _Damaged as error:
                self._warn(f"{self.folder / str(step)}: {error}; it is passed over.")
                continue
            self._best = facts["best"]
            own = {name: named.pop(mark) for name, mark in zip(kept or {}, _marked(kept or {}), strict=True)}
            restored = jax.tree.unflatten(jax.tree.structure(state), list(named.values()))
            return Saved(step, restored, best, facts["loop"], own)
        return None

    def _submit(self, name: str, arrays: Arrays, facts: dict[str, Any]) -> None:
        self.wait()
        copies = jax.tree.map(jnp.copy, arrays)  # the next step takes the originals' buffers
        self._pending = self._thread.submit(self._write, name, copies, facts)

    def _write(self, name: str, arrays: Arrays, facts: dict[str, Any]) -> None:
        part = self.folder / f".{name}.part"
        if self._writes:
            shutil.rmtree(part, ignore_errors=True)
        try:
            with checkpointer() as orbax:
                orbax.save(part / "arrays", sized(arrays))
            if not self._writes:
                return
            own = {"format": _FORMAT, "data_order": self._order, "members": self._members, "base": self._fingerprint}
            facts = {**own, **facts, "files": digests(part / "arrays")}
            (part / _FACTS).write_text(json.dumps(facts))
            shutil.rmtree(self.folder / name, ignore_errors=True)
            part.rename(self.folder / name)
        except BaseException:
            if self._writes:
                shutil.rmtree(part, ignore_errors=True)  # on a full disk this is also what makes room
            raise
        self._prune()

    def _prune(self) -> None:
        """Removes what is older than the newest `keep`, and best arrays that none of those needs."""
        for step in self.steps[: -self._keep]:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
        needed = {self._best}
        for step in self.steps:
            try:
                needed.add(json.loads((self.folder / str(step) / _FACTS).read_text())["best"])
            except (OSError, ValueError, KeyError):
                continue
        for best in self.folder.glob("best-*"):
            if best.name not in needed:
                shutil.rmtree(best, ignore_errors=True)

    def _facts(self, name: str) -> dict[str, Any]:
        """What `checkpoint.json` says, every file having been found as it was written."""
        path = self.folder / name
        try:
            facts = json.loads((path / _FACTS).read_text())
            known, base, members = facts["files"], facts["base"], facts["members"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _Damaged(f"its {_FACTS} is missing or damaged") from None
        if base != self._fingerprint:
            raise InputError(f"{path}: belongs to a base with other weights than model.source has now. Start over with --fresh.")
        if members != self._members:
            raise InputError(f"{path}: holds other members than this pack. Start over with --fresh (the old directory is renamed).")
        if facts.get("data_order") != self._order:
            raise InputError(
                f"{path}: was begun by a version that put the training examples in another order, so training cannot go on from it. "
                "Start over with --fresh (the old directory is renamed)."
            )
        for file, own in known.items():
            if not (path / "arrays" / file).is_file():
                raise _Damaged(f"the file arrays/{file} is missing")
            if digest(path / "arrays" / file) != own:
                raise _Damaged(f"the file arrays/{file} is damaged")
        return facts

    def _arrays(self, name: str, like: Arrays) -> Arrays:
        target = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in like.items()}
        try:
            with checkpointer() as orbax:
                arrays = orbax.restore(self.folder / name / "arrays", sized(target))
            return {n: arrays[n] if a.size else a for n, a in like.items()}
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise _Damaged(f"cannot be read ({reason(error)})") from None


class _Damaged(Exception):
    """A checkpoint that cannot be used; one before it may be."""


def _named(tree: Any) -> Arrays:
    """The leaves of a pytree of named tuples and dicts by their path, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def sized(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those that have any numbers; Orbax refuses the others, which some method has at some ranks."""
    return {name: a for name, a in arrays.items() if a.size}


def _marked(kept: Arrays) -> Arrays:
    """The arrays that do not train, by the names that they have in a checkpoint."""
    return {f"kept/{name}": array for name, array in kept.items()}


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception) -> str:
    text = str(error)
    if "No space left" in text or "ENOSPC" in text:
        return "no space left on the disk"
    return (text.splitlines() or [type(error).__name__])[0][:160]


def checkpointer(*, alone: bool = False) -> ocp.StandardCheckpointer:
    """A checkpointer; to be closed.

    Of several processes each writes what lies on its own devices, and they meet at the coordinator. (Left to itself Orbax has them
    meet on the devices, where a training step may be under way: the two then wait for each other.)

    Args:
        alone: for process 0 by itself, and arrays it holds whole.
    """
    count = process_count()
    if count == 1:
        return ocp.StandardCheckpointer()
    active = {0} if alone else set(range(count))
    options = ocp.options.MultiprocessingOptions(active_processes=active, barrier_sync_key_prefix="alone" if alone else "all")
    return ocp.StandardCheckpointer(multiprocessing_options=options)
