"""The tokenizer that belongs to a checkpoint, always a `transformers.PreTrainedTokenizerFast` that can pad.

It comes from the files beside the weights, without remote code and without PyTorch, or from a GGUF file's metadata:
`tokenizer.ggml.model` names the algorithm (`gpt2`: byte-level BPE with merges; `llama`: SentencePiece BPE with scores),
`tokenizer.ggml.pre` how text is cut into words first. Where transformers' own GGUF converter and llama.cpp disagree (it cuts
`smollm` text by GPT-2's rule alone), this follows llama.cpp, whose rules repeat the original `tokenizer.json`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import InputError, hint
from .checkpoint import read_json
from .gguf_header import GGUFHeader, read_gguf
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
        tokenizer = tokenizer_from_metadata(read_gguf(path))
    elif (folder / "tokenizer.json").is_file():
        tokenizer = _from_tokenizer_json(folder)
    elif any((folder / name).is_file() for name in _OLDER_FILES):
        tokenizer = _from_older_files(folder)
    elif path.is_dir() and (file := weights_file(path, key=key)).suffix == ".gguf":
        tokenizer = tokenizer_from_metadata(read_gguf(file))
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


# llama.cpp's token types that are matched whole in the text before anything else.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_LONGEST = 2048  # characters of a token; those of real vocabularies have a few hundred at most

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Split:
    """How words are cut: each pattern in turn cuts the pieces of the one before. The flags are llama.cpp's defaults."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is in the vocabulary is taken without merging
    add_bos: bool = False


_DIGITS = Split((r"\p{N}", _GPT2))
_LLAMA3 = Split((_WORDS % r"\p{N}{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = Split((_WORDS % r"\p{N}",))
_PUNCTUATED = r"[\p{P}\$\+<=>\^~\|%s]+"

SPLITS: dict[str, Split] = {
    "default": Split((_PUNCTUATED % "", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Split((_PUNCTUATED % "`", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), Split((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split((_WORDS % r"\p{N}{1,3}",))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": Split((_CASED % ("", "", r"\p{N}"),), whole_words=True, add_bos=True),
    "gpt-4o": Split((_CASED % (_SUFFIX, _SUFFIX, r"\p{N}{1,3}"),)),
}


def tokenizer_from_metadata(header: GGUFHeader) -> PreTrainedTokenizerFast:
    """The tokenizer that the `tokenizer.*` keys describe, special tokens, bos/eos rules and chat template included.

    Raises:
        InputError: the keys are missing or contradict each other, or name rules that are not known here.
    """
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.ggml.model" not in header.metadata:
        raise InputError(f"{header.path}: this GGUF file holds no tokenizer ('tokenizer.ggml.model' is missing).")
    model = header.get("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise InputError(f"{header.path}: the tokenizer kind '{model}' is not supported in GGUF. {hint(model, builders)}")
    tokens = _strings(header, "tokenizer.ggml.tokens")
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) > _LONGEST:  # every way to cut a token in two is looked at
        raise InputError(f"{header.path}: token {longest} has {len(tokens[longest])} characters; more than {_LONGEST} are not read.")
    types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"{header.path}: {len(tokens)} tokens but {len(types)} token types.")
    with _no_panic(f"{header.path}: its vocabulary makes no tokenizer"):
        try:
            tokenizer, add_bos = builders[model](header, tokens, types)
        except InputError:
            raise
        except Exception as error:  # the Rust library raises bare Exception, for a merge outside the vocabulary say
            raise InputError(f"{header.path}: its vocabulary makes no tokenizer ({error}).") from None
        _add_whole_tokens(tokenizer, tokens, types)

    def special(name: str) -> str | None:
        index = header.get(f"tokenizer.ggml.{name}_token_id", int, None)
        if index is not None and not 0 <= index < len(tokens):
            raise InputError(f"{header.path}: the {name} token is number {index} of {len(tokens)}.")
        return None if index is None else tokens[index]

    bos, eos = special("bos"), special("eos")
    first = [bos] if bos and header.get("tokenizer.ggml.add_bos_token", bool, add_bos) else []
    last = [eos] if eos and header.get("tokenizer.ggml.add_eos_token", bool, False) else []
    if first or last:
        tokenizer.post_processor = _surround(tokenizer, first, last)
    named = {"bos_token": bos, "eos_token": eos, "unk_token": special("unknown"), "pad_token": special("padding")}
    length = header.get(f"{header.get('general.architecture', str, '')}.context_length", int, None)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{key: AddedToken(token, normalized=False, special=True) for key, token in named.items() if token is not None},
        **({"model_max_length": length} if length else {}),
    )
    wrapped.chat_template = header.get("tokenizer.chat_template", str, None)
    return wrapped


def _strings(header: GGUFHeader, key: str) -> list[str]:
    values = header.get(key, list)
    if not values or not isinstance(values[0], str):  # an array's items are all of one type
        raise InputError(f"{header.path}: '{key}' should be a list of strings.")
    return values


def _byte_level(header: GGUFHeader, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    name = header.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise InputError(f"{header.path}: the pre-tokenizer '{name}' is not known here. {hint(name, SPLITS)}".rstrip())
    split = SPLITS[name]
    merges = []
    for merge in _strings(header, "tokenizer.ggml.merges"):
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(tokens), merges=merges, ignore_merges=split.whole_words))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(header: GGUFHeader, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: pieces join in the order of the joined piece's score; what is unknown falls apart into bytes."""
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise InputError(f"{header.path}: {len(tokens)} tokens but {len(scores)} scores.")
    vocabulary = _vocabulary(tokens)
    merges = _merges_from_scores(tokens, types, scores)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    unspace = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *unspace])
    return tokenizer, True


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first."""
    joinable = {t for t, kind in zip(tokens, types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        if token in joinable:
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            found += [(-score, pair) for pair in pairs if pair[0] in joinable and pair[1] in joinable]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special tokens, user-defined ones plain added tokens: both are found whole in the text."""
    rows = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in rows if kind in (_CONTROL, _UNKNOWN)])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in rows if kind == _USER_DEFINED])


def _surround(tokenizer: Tokenizer, first: list[str], last: list[str]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )
