"""A run's directory, `<tracking.dir>/<name>/`: made once, then resumed or refused, never silently overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config.load import config_of, dump_config
from ..config.messages import belongs_to, section_keys
from ..config.yaml import parse
from ..errors import InputError
from . import files as lock
from .files import read_json, write_atomic, write_json
from .results import MemberResult, read_run, write_results_csv
from .state import RunState, read_state, update_state

PACKAGES = (
    "lora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers", "transformers", "tensorboardX",
)  # fmt: skip


def describe_environment(devices: Sequence[Any] | None = None, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Describes this process's software and hardware as plain JSON values.

    Args:
        devices: JAX devices (anything with `platform` and `device_kind`); by default `jax.devices()`, which starts the backend.
        argv: The command line; by default this process's. Of its first word only the file name is kept.
    """
    if devices is None:
        import jax  # not at the top: reading results needs no JAX

        devices = jax.devices()
    argv = list(sys.argv if argv is None else argv)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(argv[0]).name, *argv[1:]] if argv else [],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "backend": devices[0].platform if devices else None,
        "devices": {"kind": devices[0].device_kind if devices else None, "count": len(devices)},
        "packages": _versions(),
        "git": _git(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git() -> dict[str, Any] | None:
    """Commit of the working folder's repository and whether tracked files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


# What lies in a run directory, beside a folder for each member (TensorBoard events, `results.json`, adapters).
LAYOUT = {
    "config.yaml": "the resolved config",
    "environment.json": "software and hardware it ran on, at the start and at each resume",
    "state.json": "what was decided: packs, splits, rungs, execution modes; figures of the whole run",
    "results.csv": "a row for each member",
    "summary.csv": "a row for each setting: means and intervals over its seeds",
    "heatmap.png": "ranks by targets, where both were swept",
    "report.html": "the report",
    "checkpoints": "a folder for each pack, from which an interrupted pack resumes",
    "logs": "output of the processes that `lora-jax launch` started",
    "profile": "the trace of `tracking.profile`",
}
# A member with one of these names gets another folder. Earlier versions wrote the last three.
_RESERVED = (*LAYOUT, "plan.json", "halving.json", "summary.json")

# Where the directory lies is no part of the experiment: a run stays resumable after its folder was moved.
# Nor do devices and safety: it may go on elsewhere, with other checkpoints. And a sweep may grow: its members are told apart by name.
IGNORED = frozenset(
    {
        "tracking.dir",
        "tracking.checkpoint_every",
        "tracking.keep_checkpoints",
        "tracking.profile",
        "tracking.compile_cache",
        "training.pack",
        "training.chunk",
        "mesh",
        "sweep",
    }
)
_EXTENSION = "training.extend_steps"
_SHOWN = 8
_ABSENT = object()


@dataclass
class RunDirectory:
    """An open run directory; make one with `RunDirectory.open`.

    Attributes:
        path: `<root>/<name>`.
        resumed: Whether it held this run already.
        statuses: Member name -> `finished`, `diverged` or `failed`, for the members that had ended before.
        replaced: Where the old directory went (`fresh`), else None.
    """

    path: Path
    resumed: bool = False
    statuses: dict[str, str] = field(default_factory=dict)
    replaced: Path | None = None

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str,
        config_yaml: str,
        *,
        fresh: bool = False,
        devices: Sequence[Any] | None = None,
        write: bool = True,
        members: Sequence[int] | None = None,
    ) -> RunDirectory:
        """Makes `<root>/<name>`, or reopens it if it holds a run of the same config.

        Args:
            root: `tracking.dir`.
            name: The run's name; one plain folder name.
            config_yaml: The resolved config.
            fresh: Start anew; an old run of this name is kept as `<name>.old-1`, `<name>.old-2`, ...
            devices: JAX devices for `environment.json`; by default `jax.devices()`, asked for only when needed.
            write: False in processes other than the first: they see the same object and write nothing. Let the first
                process open it, then synchronize, then the others.
            members: Numbers of the members this process will write, where others, at the same time, write the rest.

        Raises:
            InputError: The name leaves `root`; another config ran under this name; the folder is no run directory; or
                another process is writing to it. Nothing on the disk has changed then.
        """
        if name in ("", ".", "..") or name != Path(name).name or "\\" in name or name.startswith("."):
            raise InputError(f"name: '{name}' is not a plain folder name")
        path = Path(root) / name
        if not write:
            # The first process has been here: whether it resumed is in what it wrote.
            resumed = "resumed" in read_json(path / "environment.json")
            return cls(path, resumed=resumed, statuses=_statuses(path) if resumed else {})
        run = cls(path)
        if members is None:
            run._open(config_yaml, fresh, devices, None)
        else:
            path.mkdir(parents=True, exist_ok=True)
            with lock.turn(path):  # many come at once, and the first of them makes it
                run._open(config_yaml, fresh, devices, members)
        return run

    @classmethod
    def look(cls, path: Path, config_yaml: str) -> RunDirectory:
        """A run that is there, to read: nothing is written, and another process may be writing.

        Raises:
            InputError: it is of another config.
        """
        return cls(path, resumed=True, statuses={} if _extended(path, config_yaml) else _statuses(path))

    def _open(self, config_yaml: str, fresh: bool, devices: Sequence[Any] | None, members: Sequence[int] | None) -> None:
        path = self.path
        if holds_run(path):
            lock.acquire(path, members)
            try:
                self._take_over(config_yaml, fresh)
            except BaseException:
                lock.release(path)
                raise
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(path, members)
        write_atomic(path / "config.yaml", config_yaml)
        environment = describe_environment(devices)
        if self.resumed and (path / "environment.json").exists():
            first = read_json(path / "environment.json")
            environment = first | {"resumed": [*first.get("resumed", []), environment]}
        write_json(path / "environment.json", environment)

    def _take_over(self, config_yaml: str, fresh: bool) -> None:
        if fresh:
            self.replaced = set_aside(self.path)
            return
        if _extended(self.path, config_yaml):
            self._reopen_members()
        self.resumed, self.statuses = True, _statuses(self.path)

    def _reopen_members(self) -> None:
        """More steps: no member has ended any more. What each came to before is kept beside."""
        for file in self.path.glob("*/results.json"):
            file.rename(file.with_name(f"results-{MemberResult.read(file).steps}.json"))

    @staticmethod
    def pack_id(members: Sequence[str]) -> str:
        """What a pack of these members is called in the run's files."""
        return hashlib.sha256("\n".join(members).encode()).hexdigest()[:12]

    def checkpoints(self, members: Sequence[str]) -> Path:
        """The folder of the checkpoints of a pack of these members; not made here."""
        return self.path / "checkpoints" / self.pack_id(members)

    def state(self) -> RunState:
        """What was decided so far; see `read_state`."""
        return read_state(self.path)

    def update_state(self, change: Callable[[RunState], None]) -> RunState:
        """Changes that; see `update_state`. For the writer alone, where several processes train together."""
        return update_state(self.path, change)

    def started_packs(self) -> list[list[str]]:
        """The members of each pack that has a checkpoint."""
        found = []
        for folder in sorted((self.path / "checkpoints").glob("*")):
            steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), reverse=True)
            for step in steps:  # a damaged one is passed over here as it is when it is read
                try:
                    names = read_json(folder / str(step) / "checkpoint.json")["members"]
                except (InputError, KeyError):
                    continue
                if isinstance(names, list) and self.checkpoints(names) == folder:
                    found.append(names)
                    break
        return found

    def trained(self) -> list[MemberResult]:
        """The newest result of each member that has one; before a run was extended or a member tried again counts too."""
        newest = {file.parent: file for file in sorted(self.path.glob("*/results-*.json"), key=lambda file: file.stat().st_mtime_ns)}
        newest |= {file.parent: file for file in self.path.glob("*/results.json")}
        return [MemberResult.read(file) for _, file in sorted(newest.items())]

    def refresh(self) -> None:
        """Reads anew which members have ended."""
        self.statuses = _statuses(self.path)

    def member(self, name: str) -> Path:
        """The folder of a member; made by whoever writes into it."""
        return self.path / member_folder(name)

    def results(self) -> list[MemberResult]:
        """The results so far; see `read_run`."""
        return read_run(self.path)

    def write_results(self, results: Sequence[MemberResult]) -> Path:
        """Writes `results.csv`."""
        return write_results_csv(self.path / "results.csv", results)

    def close(self) -> None:
        """Lets other processes write here. The end of the process does so too."""
        lock.release(self.path)


def _extended(path: Path, config_yaml: str) -> bool:
    """Whether a run's config differs from its own in more steps alone.

    Raises:
        InputError: it differs in anything else that matters.
    """
    try:
        old = parse((path / "config.yaml").read_text(encoding="utf-8"), "config.yaml")[0] or {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'config.yaml'}: cannot be read ({error}). Give another 'name=', or --fresh.") from None
    new = parse(config_yaml, "config.yaml")[0] or {}
    with contextlib.suppress(InputError):  # one that is no valid config today is compared as it is
        old = parse(dump_config(config_of(old, str(path))), "config.yaml")[0]  # with defaults for keys that were added since
    changes = {key: change for key, change in differences(old, new).items() if not _says_nothing(key, *change, new)}
    was, now = changes.get(_EXTENSION, (0, 0))
    if set(changes) == {_EXTENSION} and isinstance(was, int) and isinstance(now, int) and was < now:
        return True
    if changes:
        shown = [f"  {key}: {_text(was)} -> {_text(now)}" for key, (was, now) in list(changes.items())[:_SHOWN]]
        more = [f"  ... and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
        advice = "Give this run another 'name=', or --fresh to start over (the old directory is renamed)."
        raise InputError("\n".join([f"{path} holds a run with another config (old -> new):", *shown, *more, advice]))
    return False


def _says_nothing(key: str, was: Any, now: Any, config: Mapping[str, Any]) -> bool:
    """Whether a key is in one of two configs alone, and changes nothing: it is another method's or task's, or has its default."""
    if now is _ABSENT:
        return bool(belongs_to(key))
    if was is not _ABSENT:
        return False
    if isinstance(now, Mapping) and key in section_keys():
        return all(_says_nothing(f"{key}.{name}", _ABSENT, value, config) for name, value in now.items())
    try:
        section: Any = config_of(config, "config.yaml")
        *parents, name = key.split(".")
        for parent in parents:
            section = getattr(section, parent)
        return type(section).model_fields[name].get_default(call_default_factory=True) == now
    except (InputError, AttributeError, KeyError):
        return False


def holds_run(path: Path) -> bool:
    """Whether a run is there (True), or nothing, an empty folder, or the logs of one that did not begin (False).

    Raises:
        InputError: Something else is there, which must not be touched.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise InputError(f"{path} is a file. Give this run another 'name=' or 'tracking.dir='.")
    if (path / "config.yaml").is_file():
        return True
    if any(p.name not in (".lock", ".turn", "logs") for p in path.iterdir()):
        raise InputError(f"{path} exists and is not a run directory (it has no config.yaml). Give another 'name=' or 'tracking.dir='.")
    return False


def set_aside(path: Path) -> Path:
    """Renames a run directory that no process is writing to; returns its new name, `<name>.old-1`, `<name>.old-2`, ...

    Raises:
        InputError: Another process is writing to it.
    """
    lock.acquire(path)
    asides = (path.with_name(f"{path.name}.old-{count}") for count in itertools.count(1))
    aside = next(aside for aside in asides if not aside.exists())
    lock.release(path)
    path.rename(aside)
    return aside


def _statuses(path: Path) -> dict[str, str]:
    results = [MemberResult.read(file) for file in sorted(path.glob("*/results.json"))]
    return {result.name: result.status for result in results}


def member_folder(name: str) -> str:
    """A safe folder name for a member: the name itself where possible, else a cleaned one with a hash of the original.

    >>> member_folder("rank=4,targets=attention")
    'rank=4,targets=attention'
    >>> member_folder("targets=../x")
    'targets=.._x-bb55ab00'
    """
    clean = re.sub(r"[^A-Za-z0-9._=,+-]", "_", name)[:100].lstrip(".") or "member"
    # A trailing dot is dropped by Windows; a changed name might meet another member's.
    if clean == name and clean not in _RESERVED and not clean.endswith("."):
        return clean
    return f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), for every key of two nested mappings that differs; a missing key shows as such.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    {'a.b': (1, 2)}
    """
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return {} if (old == new and type(old) is type(new)) or _same_path(old, new) else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if dotted not in IGNORED:
            found |= differences(old.get(key, _ABSENT), new.get(key, _ABSENT), dotted)
    return found


def _same_path(old: Any, new: Any) -> bool:
    """Whether two values are one path, which a run of an older version kept relative to where it was started."""
    if not (isinstance(old, str) and isinstance(new, str)) or os.path.isabs(old) == os.path.isabs(new):
        return False
    return os.path.realpath(old) == os.path.realpath(new)


def _text(value: Any) -> str:
    text = "(absent)" if value is _ABSENT else "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
