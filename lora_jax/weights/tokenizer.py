"""The tokenizer that belongs to a checkpoint, always a `transformers.PreTrainedTokenizerFast` that can pad.

It comes from the files beside the weights, without remote code and without PyTorch, or from a GGUF file's metadata
(`gguf_tokenizer.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .checkpoint import read_json
from .gguf_header import read_gguf
from .gguf_tokenizer import tokenizer_from_metadata
from .load import HUB_FILES, resolve, weights_file

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
    """The tokenizer of a model: from the files in its folder, or from a GGUF file's metadata.

    Args:
        source: as for `load_model`. For a `.safetensors` file its folder is used.
        key: the config key that `source` came from, for messages.

    Returns:
        a tokenizer with a pad token (eos if it has none), without truncation or padding, and with the chat template if there is one.

    Raises:
        InputError: there is no tokenizer, it is damaged, or it needs remote code.
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
    with _no_panic(f"{path}: its tokenizer cannot be used"):
        _try_out(tokenizer)
    # Some tokenizer.json files carry the limits of the program that wrote them (MiniLM's pads everything to 128).
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token is None:
        # Padding is masked wherever it matters, so any token will do; eos is what everybody takes.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _from_gguf(file: Path) -> PreTrainedTokenizerFast:
    header = read_gguf(file)
    with _no_panic(f"{header.path}: its vocabulary makes no tokenizer"):
        return tokenizer_from_metadata(header)


def _from_tokenizer_json(folder: Path) -> PreTrainedTokenizerFast:
    """`tokenizer.json` as it stands, with the names and the chat template of the files beside it.

    Not through `AutoTokenizer`: transformers 5 rebuilds the pipeline of some classes from their vocabulary alone, and so drops
    SmolLM2's splitting of digits (its folder says `GPT2Tokenizer`).
    """
    from transformers import PreTrainedTokenizerFast

    names = {"tokenizer_config.json", "special_tokens_map.json"}
    named = [read_json(folder / name, "the tokenizer's config") for name in sorted(names) if (folder / name).is_file()]
    with _no_panic(f"{folder / 'tokenizer.json'}: not a tokenizer that can be read"):
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

    with _no_panic(f"{folder}: its tokenizer files cannot be read"):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated kinds; all mean that these files make no tokenizer
            raise InputError(f"{folder}: its tokenizer files cannot be read without a tokenizer.json ({_first_line(error)}).") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: only its slow tokenizer could be built; add a tokenizer.json.")
    return tokenizer


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """A panic of the Rust library as an `InputError`: it is a BaseException, of a class that nothing can import."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({_first_line(error)}).") from None


def _try_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Some files are read without complaint and panic at the first text."""
    with contextlib.suppress(Exception):  # a vocabulary without these letters is no fault of its own
        tokenizer.decode(tokenizer("A film, 1 é")["input_ids"])


def check_text(text: str, what: str) -> str:
    """The text, if it is one.

    Raises:
        InputError: it holds half of a character (a surrogate, as JSON's "\\ud83d" by itself gives it), which no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{what}: holds {half!a} at character {error.start}, half of a character (a lone surrogate).") from None
    return text


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
