"""A tokenizer from GGUF metadata: the vocabulary is in the file, the rules are llama.cpp's, by name.

`tokenizer.ggml.model` says which algorithm (`gpt2`: byte-level BPE with merges; `llama`: SentencePiece BPE with scores) and
`tokenizer.ggml.pre` how text is cut into words first. Where transformers' own GGUF converter and llama.cpp disagree (it cuts
`smollm` text by GPT-2's rule alone), this follows llama.cpp, whose rules repeat the original `tokenizer.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..config.errors import InputError, hint
from .gguf_header import GGUFHeader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# llama.cpp's token types that are matched whole in the text before anything else.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

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
    types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"{header.path}: {len(tokens)} tokens but {len(types)} token types.")
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
