"""The tokenizer that a GGUF file's metadata describes.

`tokenizer.ggml.model` names the algorithm (`gpt2`: byte-level BPE with merges; `llama`: SentencePiece BPE with scores),
`tokenizer.ggml.pre` how text is cut into words first. Where transformers' own GGUF converter and llama.cpp disagree (it cuts
`smollm` text by GPT-2's rule alone), this follows llama.cpp, whose rules repeat the original `tokenizer.json`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import InputError, hint, warn
from .gguf_header import GGUFHeader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# llama.cpp's token types that are matched whole in the text before anything else.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
NORMAL, UNUSED = 1, 5
SPACE = "▁"  # SentencePiece's spelling of a space
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


_PLAIN, _DIGITS = Split((_GPT2,)), Split((r"\p{N}", _GPT2))
_LLAMA3 = Split((_WORDS % r"\p{N}{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = Split((_WORDS % r"\p{N}",))
_GPT4O = Split((_CASED % (_SUFFIX, _SUFFIX, r"\p{N}{1,3}"),))
_PUNCTUATED = r"[\p{P}\$\+<=>\^~\|%s]+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# `tokenizer.ggml.pre` -> its rule, as llama.cpp has them.
SPLITS: dict[str, Split] = {
    "default": Split((_PUNCTUATED % "", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Split((_PUNCTUATED % "`", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0", "mellum"), _PLAIN
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), Split(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"), _QWEN2),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), Split((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")),
    "qwen35": Split((_WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}", r" ?[^\s\p{L}\p{M}") % r"\p{N}",)),
    "tekken": Split((_CASED % ("", "", r"\p{N}"),), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
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
    _say_what_is_left(header, tokens)
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
    tokenizer.pre_tokenizer = cutter(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def cutter(split: Split) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words, in the bytes' letters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(header: GGUFHeader, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: pieces join in the order of the joined piece's score; what is unknown falls apart into bytes."""
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise InputError(f"{header.path}: {len(tokens)} tokens but {len(scores)} scores.")
    pieces = [SPACE * len(t) if _is_spaces(t, kind) else t for t, kind in zip(tokens, types, strict=True)]
    # What is user-defined joins before all else, and its scores are the converter's.
    scores = [math.inf if piece is not token else score for piece, token, score in zip(pieces, tokens, scores, strict=True)]
    merges = _merges_from_scores(pieces, types, scores)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    number = header.get("tokenizer.ggml.unknown_token_id", int, None)
    if unknown is None and number is not None and 0 <= number < len(tokens):
        unknown = tokens[number]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(pieces), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend(SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    unspace = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *unspace])
    return tokenizer, True


def _is_spaces(token: str, kind: int) -> bool:
    """Whether it is a run of spaces (Gemma has them), whose original spelling the converter changed: found by merges, like all spaces."""
    return kind == USER_DEFINED and len(token) > 1 and not token.strip(" ")


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first, and of one third the longest first piece first."""
    joinable = {t for t, kind in zip(tokens, types, strict=True) if kind not in (UNKNOWN, CONTROL, BYTE)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        if token in joinable:
            pairs = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
            found += [(-score, pair) for pair in pairs if pair[0] in joinable and pair[1] in joinable]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special tokens, user-defined ones plain added tokens: both are found whole in the text."""
    rows = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in rows if kind in (CONTROL, UNKNOWN)])
    plain = [t for t, kind in rows if kind == USER_DEFINED and tokenizer.token_to_id(t) is not None]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])


# Keys that say what the tokenizer does, here or in `tokenizer_from_metadata`, or how some tokens are used elsewhere.
_KNOWN_KEYS = re.compile(
    r"tokenizer\.(ggml\.(model|pre|tokens|scores|token_type|token_type_count|merges|add_(bos|eos)_token|add_space_prefix"
    r"|(bos|eos|eot|eom|unknown|padding|mask|seperator|cls|fim_\w+|prefix|suffix|middle)_token_id)"
    r"|chat_templates?|huggingface\.json)"
)


def _say_what_is_left(header: GGUFHeader, tokens: list[str]) -> None:
    left = [k for k, v in header.metadata.items() if k.startswith("tokenizer.") and v not in (False, []) and not _KNOWN_KEYS.fullmatch(k)]
    if left:
        warn(f"{header.path}: settings of the tokenizer that are not known here are left out: {', '.join(left)}.")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        warn(f"{header.path}: tokens stand in the vocabulary twice, among them {twice!r}: of each, the last is used.")


def _surround(tokenizer: Tokenizer, first: list[str], last: list[str]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )
