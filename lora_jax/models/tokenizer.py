"""The tokenizer that belongs to a checkpoint, always a `transformers.PreTrainedTokenizerFast`.

No network for local files, no remote code, no PyTorch. Every tokenizer that comes out of here can pad.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.errors import InputError
from ..config.locations import resolve
from .checkpoint import HUB_FILES, read_json, weights_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Without PyTorch, importing transformers says so on stderr. Here that is no news: tokenizers are all that is wanted of it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Any of these lets transformers build a tokenizer where there is no tokenizer.json.
_OLDER_FILES = ("tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

# What special tokens are called by convention, for a folder that holds tokenizer.json and nothing that names them.
_USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def load_tokenizer(source: str | Path, *, key: str = "model.source") -> PreTrainedTokenizerFast:
    """The tokenizer at `source`: its folder's files, or a GGUF file's metadata.

    Args:
        source: what `open_checkpoint` takes. For a `.safetensors` file its folder is read.
        key: the config key `source` came from, for messages.

    Returns:
        A tokenizer with a pad token (eos where none is named), no truncation or padding of its own, and the chat template if
        there is one.

    Raises:
        InputError: there is no tokenizer, or it is broken or needs code that is not run.
    """
    path = resolve(str(source), key=key, hub_patterns=HUB_FILES)
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf":
        tokenizer = _from_gguf(path)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = _from_tokenizer_json(folder)
    elif any((folder / name).is_file() for name in _OLDER_FILES):
        tokenizer = _from_older_files(folder)
    elif path.is_dir() and (file := weights_file(path, key=key)).suffix == ".gguf":
        tokenizer = _from_gguf(file)
    else:
        raise InputError(f"{key}: {folder} holds no tokenizer: neither tokenizer.json nor {', '.join(_OLDER_FILES)}.")
    # Some tokenizer.json files carry the limits of the program that wrote them (MiniLM's pads everything to 128).
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token is None:
        # Padding is masked wherever it matters, so any token will do; eos is what everybody takes.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    # Imported on use: both import `gguf`, which takes a while and which folders do not need.
    from .gguf_header import read_gguf_header
    from .gguf_tokenizer import tokenizer_from_metadata

    return tokenizer_from_metadata(read_gguf_header(path))


def _from_tokenizer_json(folder: Path) -> PreTrainedTokenizerFast:
    """`tokenizer.json` as it stands, with the names and the chat template of the files beside it.

    Not through `AutoTokenizer`: transformers 5 rebuilds the pipeline of some classes from their vocabulary alone, and so drops
    SmolLM2's splitting of digits (its folder says `GPT2Tokenizer`).
    """
    from transformers import PreTrainedTokenizerFast

    names = {"tokenizer_config.json", "special_tokens_map.json"}
    named = [read_json(folder / name, "the tokenizer's config") for name in sorted(names) if (folder / name).is_file()]
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust parser raises bare Exception
        raise InputError(f"{folder / 'tokenizer.json'}: not a tokenizer that can be read ({_first_line(error)}).") from None
    if not any(key in config for config in named for key in _USUAL_NAMES):
        vocabulary = tokenizer.get_vocab()
        for key, choices in _USUAL_NAMES.items():
            present = [token for token in choices if token in vocabulary]
            if present and getattr(tokenizer, key) is None:
                setattr(tokenizer, key, present[0])
    return tokenizer


def _from_older_files(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated kinds; all mean that these files make no tokenizer
        raise InputError(f"{folder}: its tokenizer files cannot be read without a tokenizer.json ({_first_line(error)}).") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: only its slow tokenizer could be built; add a tokenizer.json.")
    return tokenizer


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
