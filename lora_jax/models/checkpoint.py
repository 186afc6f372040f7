"""Named tensors on disk, read one at a time, whatever file they lie in.

A `Checkpoint` speaks Hugging Face: its names (`model.layers.0.self_attn.q_proj.weight`), its layout (a linear weight is
`(out, in)`) and its config dict. Opening one reads headers only; each `read` opens the file, takes the bytes asked for and
closes it again, so a model never lies in memory twice and no mapping keeps it there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.errors import InputError, hint
from ..config.locations import resolve

# What a hub repository is asked for: weights in the one format that is read, configs, tokenizer files. Not its pickles, nor
# the second copies that some keep (`original/`, `consolidated.safetensors`), nor dozens of GGUF quantisations.
HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLE = "pickle files are never loaded, for they can run code; convert it to safetensors (save_pretrained writes that)."


class Checkpoint(ABC):
    """Read-only named tensors plus the Hugging Face config dict they belong to.

    Attributes:
        path: the file or folder it was opened from.
        config: what `config.json` says (for a GGUF file: what it would say).
    """

    path: Path
    config: dict[str, Any]

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor's Hugging Face name, in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read(name)` gives; a linear weight is `(out, in)`."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read(name)` gives: the stored one (bfloat16 through ml_dtypes); float32 for quantised tensors."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The tensor, in fresh memory: nothing else keeps it alive."""

    @abstractmethod
    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """`read(name)[tuple(index)]`, touching little more of the file than that.

        Args:
            index: up to one slice per axis, of step 1: what `jax.make_array_from_callback` passes.
        """

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _missing(self, name: str) -> InputError:
        return InputError(f"{self.path}: no tensor '{name}'. {hint(name, self.names())}".rstrip())


def open_checkpoint(source: str | Path, *, key: str = "model.source") -> Checkpoint:
    """The checkpoint that `source` names, without reading any weights yet.

    Args:
        source: a Hugging Face folder (`model.safetensors`, or an index and its shards), one `.safetensors` file with a
            `config.json` beside it, a `.gguf` file or a folder holding one; also as `hf://` or `package://`.
        key: the config key `source` came from, for messages.

    Raises:
        InputError: nothing usable is there, or a file is broken; the message names the file.
    """
    path = resolve(str(source), key=key, hub_patterns=HUB_FILES)
    file = weights_file(path, key=key)
    # Imported on use: most runs read one of the two formats, and `gguf` takes a while to import.
    if file.suffix == ".gguf":
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(file)
    from .safetensors_files import SafetensorsCheckpoint

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
        raise InputError(f"{key}: {path} is neither a .safetensors nor a .gguf file.")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).is_file():
            return path / name
    adapters = {"adapter_model.safetensors"}
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf") and p.name not in adapters)
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
    raise InputError(f"{key}: {path} holds no model.safetensors, no model.safetensors.index.json and no .gguf file.")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: it is missing, is not JSON, or is not an object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file ({what}).") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} should be a JSON object, not {type(value).__name__}.")
    return value


def parse_json(text: str) -> Any:
    """`json.loads`, but a key that stands twice in an object is an error: readers disagree about which of the two is meant.

    Raises:
        ValueError: it is not JSON, or a key stands twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
        return value

    return json.loads(text, object_pairs_hook=once)


def slice_bounds(shape: tuple[int, ...], index: Sequence[slice]) -> list[tuple[int, int]]:
    """`(start, stop)` per axis of `shape` for `index`, axes that it does not name whole.

    >>> slice_bounds((4, 6), [slice(1, 3)])
    [(1, 3), (0, 6)]
    """
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a tensor of {len(shape)} axes")
    bounds = []
    for size, part in zip(shape, [*index, *[slice(None)] * (len(shape) - len(index))], strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"slices of step 1 only, not {part}")
        bounds.append((start, max(start, stop)))
    return bounds
