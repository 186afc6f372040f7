"""Where a `source` points (a path, a file of an installed package, a hub repository), and the checkpoint that is there."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.load import looked_for
from ..errors import InputError, nearest, warn
from .checkpoint import PIECE, Checkpoint, GGUFArchitecture, first_part, read_json

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
    path = Path(os.path.expanduser(source))  # of a user who is not known it is the text as it stands
    if not os.path.exists(path):
        where = "" if path.is_absolute() else f" (looked for {' and '.join(looked_for(source))})"
        on_hub = f" On the Hugging Face hub? Write hf://{source}." if _HUB.fullmatch(f"hf://{source}") and not path.suffix else ""
        raise InputError(f"{key}: no file or folder '{source}'{_near_files(path)}{where}.{on_hub}")
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
        raise InputError(f"{key}: cannot fetch '{source}' ({hub_reason(error)}).") from None


@functools.cache
def _snapshot(repo: str, kind: str, revision: str | None, patterns: tuple[str, ...] | None) -> Path:
    """Asked once in a process: the weights, the tokenizer and an export read one commit, though a branch moves meanwhile."""
    import huggingface_hub

    with hub_or_cache(repo, kind):
        wanted = None if patterns is None else list(patterns)
        return Path(huggingface_hub.snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=wanted))


# How long the hub may take to answer.
_ANSWER_SECONDS = 10.0


@contextlib.contextmanager
def hub_or_cache(repo: str, kind: str) -> Iterator[None]:
    """What is read of the hub inside comes from its cache alone where the hub does not answer or give it, and a word says so.

    The clients would try again and again, for half a minute.

    Args:
        repo: org/name.
        kind: `model` or `dataset`.

    Raises:
        InputError: so it is, and what was asked for is not in the cache, or cannot be read there.
    """
    from huggingface_hub import constants

    why = _why_not(repo, kind)
    if why is None:
        yield
        return
    clients: list[Any] = [constants]
    if kind == "dataset":
        from datasets import config

        clients.append(config)
    before = [client.HF_HUB_OFFLINE for client in clients]
    try:
        for client in clients:
            client.HF_HUB_OFFLINE = True
        yield
    except InputError:
        raise
    except Exception as error:  # of the hub's client, or of what reads the cache's files
        raise InputError(f"{why}; and {_of_cache(error)}") from None
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value
    warn(f"{why}: what is in its cache of '{repo}' is read, be it up to date or not.")


def _why_not(repo: str, kind: str) -> str | None:
    """Why the hub is not asked for files: it does not answer, or refuses the repository; None where it is asked."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().repo_info(repo, repo_type=kind, timeout=_ANSWER_SECONDS)
            outcome.append(None)
        except Exception as error:  # whatever its HTTP library raises
            outcome.append(error)

    # The library's own limit holds for each address that a name has: where packets vanish, these are a dozen.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"nothing came in {_ANSWER_SECONDS:g} seconds")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return f"the hub does not answer: {hub_reason(error)}"
        return f"the hub does not give it: {hub_reason(error)}" if status == 401 or _is(error, "RepositoryNotFoundError") else None
    # Nobody wants it to answer, or there is no such name: its client says so.
    if error is None or isinstance(error, OfflineModeIsEnabled | ValueError):
        return None
    return f"the hub does not answer: {hub_reason(error)}"


def _of_cache(error: Exception) -> str:
    """What is the matter with the copy in the cache, where the hub is not asked."""
    # Who asks for what is not there asks the hub: `datasets` then speaks of the connection.
    if isinstance(error, ConnectionError) or _is(error, "LocalEntryNotFoundError"):
        return _lacking(error)
    return f"its copy in the cache cannot be read: {hub_reason(error)}"


def _lacking(error: Exception) -> str:
    if not _is(error, "IncompleteSnapshotError"):
        return "its files are not in the cache"
    named = re.search(r"missing \((.+?)\)", str(error))
    return "its copy in the cache is not whole" + (f": it lacks {named[1]}" if named else "")


def _is(error: BaseException | None, name: str) -> bool:
    return name in {kind.__name__ for kind in type(error).__mro__}


def hub_reason(error: Exception) -> str:
    """Why the hub's client failed, in a few words."""
    if _is(error, "GatedRepoError"):
        return "its owner grants access: ask for it on the repository's page, then log in with `hf auth login`"
    if _is(error, "RepositoryNotFoundError"):
        return "no such repository, or a private one; `hf auth login` gives access to yours"
    if _is(error, "RevisionNotFoundError"):
        return "the repository has no such revision"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return "your login is not valid: renew it with `hf auth login`, or remove HF_TOKEN"
    if _is(error, "OfflineModeIsEnabled") or _is(error.__cause__, "OfflineModeIsEnabled"):
        return f"HF_HUB_OFFLINE is set, and {_lacking(error)}"
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__


# What a hub repository is asked for: weights in the one format that is read, configs, tokenizer files. Not its pickles, nor
# the second copies that some keep (`original/`, `consolidated.safetensors`), nor dozens of GGUF quantisations.
HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLE = "pickle files are never loaded, for they can run code; convert it to safetensors (save_pretrained writes that)."


def open_checkpoint(
    source: str | Path, *, key: str = "model.source", architectures: Mapping[str, GGUFArchitecture] | None = None
) -> Checkpoint:
    """The checkpoint that `source` names; no weights are read yet.

    Args:
        source: a Hugging Face folder (`model.safetensors`, or an index and its shards), one `.safetensors` file with a
            `config.json` beside it, a `.gguf` file or a folder holding one; also as `hf://` or `package://`.
        key: the config key `source` came from, for messages.
        architectures: of GGUF files, those that can be read (`models.families.gguf_architectures`).

    Raises:
        InputError: nothing usable is there, or a file is broken; the message names the file.
    """
    path = resolve(str(source), key=key, hub_patterns=HUB_FILES)
    try:
        file = weights_file(path, key=key)
    except InputError as error:
        if not str(source).startswith("hf://"):
            raise
        raise InputError(
            f"{error} GGUF files of the hub are not fetched: hf download {str(source)[5:]} NAME.gguf, and give its path."
        ) from None
    # Imported on use: most runs read one of the two formats, and `gguf` takes a while to import.
    if file.suffix == ".gguf":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(file, architectures or {})
    from .safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(file, read_json(file.parent / "config.json", "the model's config"))


def weights_file(path: Path, *, key: str) -> Path:
    """The file that holds (or indexes) the weights at `path`, which is that file or a folder.

    Raises:
        InputError: there is none, or several and no telling which.
    """
    if path.is_file():
        if path.suffix in (".safetensors", ".gguf") or path.name.endswith(".safetensors.index.json"):
            return path
        if path.suffix in _PICKLES:
            raise InputError(f"{key}: {path}: {_NO_PICKLE}")
        if PIECE.fullmatch(path.name):
            raise InputError(f"{key}: {_joining(path)}")
        raise InputError(f"{key}: {path} is neither a .safetensors nor a .gguf file.")
    whole = [path / name for name in ("model.safetensors", "model.safetensors.index.json") if (path / name).is_file()]
    others = sorted(p for p in path.glob("*.gguf"))
    if whole:
        if (path / "adapter_model.safetensors").is_file():
            warn(f"{key}: {path} holds an adapter beside the model (adapter_model.safetensors), which is not applied.")
        if len(whole) > 1 or others:
            passed = ", ".join(p.name for p in [*whole[1:], *others[:4]])
            warn(f"{key}: {path} holds several models; {whole[0].name} is read, and not {passed}.")
        return whole[0]
    adapters = {"adapter_model.safetensors"}
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf") and p.name not in adapters)
    if found and len({first_part(p) for p in found}) == 1:
        return first_part(found[0])
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(p.name for p in found[:6]) + (", ..." if len(found) > 6 else "")
        raise InputError(f"{key}: {path} holds several weight files and no index; name one: {shown}.")
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise InputError(f"{key}: {path} holds only {pickles[0]}: {_NO_PICKLE}")
    if (path / "adapter_model.safetensors").is_file():
        raise InputError(f"{key}: {path} holds an adapter, not a base model; give its base here.")
    pieces = sorted(p for p in path.iterdir() if PIECE.fullmatch(p.name))
    if pieces:
        raise InputError(f"{key}: {_joining(pieces[0])}")
    raise InputError(f"{key}: {path} holds no model.safetensors, no model.safetensors.index.json and no .gguf file.")


def _joining(piece: Path) -> str:
    """What to do with a file that was cut into pieces."""
    match = PIECE.fullmatch(piece.name)
    assert match is not None
    whole = match["whole"]
    return (
        f"{piece} is one piece of a file that was cut to be carried. Join the pieces in the order of their numbers, and name the whole:"
        f" cat {whole}{match['cut']}* > {whole}"
    )
