"""Where a `source` string points: a path, a file of an installed distribution, or a hub repository."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from ..errors import InputError, nearest

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve(source: str, *, key: str, hub_kind: str = "model", hub_patterns: list[str] | None = None) -> Path:
    """The existing local file or folder that `source` names.

    Args:
        source: a path, `package://import_name/path` (found without importing the package), or
            `hf://org/name[@revision]` (downloaded to the hub cache, or read from it when offline).
        key: the config key the string came from, for messages.
        hub_kind: `model` or `dataset`.
        hub_patterns: which files of a hub repository are wanted (globs); all by default.

    Raises:
        InputError: nothing is there, or a package path leaves its package.
    """
    if source.startswith("package://"):
        return _package_file(source, key)
    if source.startswith("hf://"):
        return _hub_folder(source, key, hub_kind, hub_patterns)
    if "://" in source:
        raise InputError(f"{key}: '{source}' has an unknown scheme; use a path, hf://org/name or package://import_name/path.")
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{key}: no file or folder '{source}'{_near_files(path)}.")
    return path


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder '{path.parent}')"
    near = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f"; nearby: {', '.join(near)}" if near else ""


def _package_file(source: str, key: str) -> Path:
    name, _, inner = source.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{key}: '{source}': no installed package '{name}'. Install it, or give a path.")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{key}: '{source}' leaves the package '{name}'.")
    if not path.exists():
        raise InputError(f"{key}: '{source}': the package '{name}' holds no '{inner}'{_near_files(path)}.")
    return path


def _hub_folder(source: str, key: str, kind: str, patterns: list[str] | None) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise InputError(f"{key}: '{source}' is not hf://org/name[@revision].")
    try:
        return _snapshot(match["repo"], kind, match["revision"], None if patterns is None else tuple(patterns))
    except Exception as error:  # the hub client raises many unrelated kinds; all mean that the files cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{key}: cannot fetch '{source}' ({reason}).") from None


@functools.cache
def _snapshot(repo: str, kind: str, revision: str | None, patterns: tuple[str, ...] | None) -> Path:
    """Asked once in a process: the weights, the tokenizer and an export read one commit, though a branch moves meanwhile."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=None if patterns is None else list(patterns)))
