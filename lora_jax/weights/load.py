"""Opening what a source names: the checkpoint in a folder, a file, an installed package or a hub repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from .checkpoint import Checkpoint, GGUFArchitecture, read_json
from .locations import resolve

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
    file = weights_file(path, key=key)
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
