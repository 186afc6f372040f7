"""A base's tokenizer as the metadata of a GGUF file, and the proof that the file's cuts texts as it does.

A base that came from a GGUF file hands its keys on. Of a `tokenizer.json` two kinds of BPE can be said: on bytes, with merges and the
name of a rule that cuts words (`weights.gguf_tokenizer.SPLITS`), and SentencePiece's, with scores, which follow from the merges' order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError, warn
from ...weights.gguf_header import read_gguf
from ...weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    cutter,
    tokenizer_from_metadata,
)
from ...weights.load import HUB_FILES, resolve, weights_file
from ...weights.tokenizer import load_tokenizer

# Words of many kinds: what one rule cuts otherwise than another is among them.
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, Apollo 11 landed; 3.14159 is not 22/7, and 2^10 = 1024! 20240229",
    "  leading and   inner    spaces, and trailing  ",
    "tabs\tand\nnewlines\n\nand\r\nboth\n \n",
    "Café déjà vu: naïve coöperation, Ω ≈ 42 µm, 日本語のテキスト, Привет мир, 안녕 🤖",
    "def f(x):\n    return x + 1  # it's, I'm, we'll, THEY'RE, o'clock\n",
    "camelCaseWords HTTPServer snake_case a-b-c e.g. ... !?! $5.00 #tag @name https://example.org/a?b=c&d",
    "x",
)
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_ENDS = ("eot", "eom")  # what ends a turn, and a message: the second and third token that the model's config ends texts with


def _gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names; None where it names another kind of checkpoint."""
    file = weights_file(resolve(source, key="model.source", hub_patterns=HUB_FILES), key="model.source")
    return file if file.suffix == ".gguf" else None


def tokenizer_metadata(source: str, rows: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer.*` keys of a file.

    Args:
        source: of the base.
        rows: of its embedding; tokens that nothing means fill the vocabulary up to them.
        config: the base's Hugging Face config.

    Raises:
        InputError: there is no tokenizer, it has more tokens than the embedding rows, or GGUF has no such kind or rule.
    """
    if (file := _gguf_file(source)) is not None:
        found = {key: value for key, value in read_gguf(file).metadata.items() if key.startswith("tokenizer.")}
        if "tokenizer.ggml.model" not in found:
            raise InputError(f"{file}: this GGUF file holds no tokenizer to hand on.")
        return found
    tokenizer = load_tokenizer(source)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = rules["model"], json.dumps([rules["normalizer"], rules["pre_tokenizer"]], ensure_ascii=False)
    if model["type"] != "BPE":
        raise InputError(f"{source}: its tokenizer is of the kind {model['type']}; those of GGUF's language models are BPE.")
    pieces = {**model["vocab"], **{added["content"]: added["id"] for added in rules["added_tokens"]}}
    if len(pieces) and max(pieces.values()) >= rows:
        raise InputError(f"{source}: its tokenizer has the token {max(pieces.values())}, and the embedding {rows} rows.")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for piece, number in pieces.items():
        tokens[number], kinds[number] = piece, NORMAL
    for added in rules["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if '"ByteLevel"' in steps:
        found = _byte_level(tokenizer, rules, source)
    elif SPACE in steps:
        found = _sentencepiece(tokenizer, model, tokens, kinds)
    else:
        raise InputError(
            f"{source}: its tokenizer works neither on bytes nor with SentencePiece's spaces, and GGUF has no other kind here."
        )
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds} | _special(tokenizer, config, source)
    return found | _template(tokenizer, source)


def _byte_level(tokenizer: Any, rules: dict[str, Any], source: str) -> dict[str, Any]:
    if rules["normalizer"] is not None:
        warn(f"{source}: its tokenizer first normalises texts ({rules['normalizer']['type']}), which llama.cpp leaves out.")
    whole, own = bool(rules["model"].get("ignore_merges")), tokenizer.backend_tokenizer.pre_tokenizer
    wanted = [own.pre_tokenize_str(text) for text in _SAMPLES]
    rules_that_fit = (
        name
        for name, split in SPLITS.items()
        if split.whole_words == whole and [cutter(split).pre_tokenize_str(text) for text in _SAMPLES] == wanted
    )
    if (name := next(rules_that_fit, None)) is None:
        raise InputError(f"{source}: its tokenizer cuts words by a rule that has no name in GGUF here.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece(tokenizer: Any, model: dict[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Scores: pieces that are merged earlier have higher ones; what no merge makes has the lowest."""
    order: dict[str, int] = {}
    for merge in model["merges"]:
        order.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), len(order))
    scores = [-float(order.get(token, len(order))) for token in tokens]
    for number, token in enumerate(tokens):
        if token == model.get("unk_token"):
            kinds[number] = UNKNOWN
        elif kinds[number] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str("a") if backend.normalizer is not None else "a"
    words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer is not None else [(text, (0, 1))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": words[0][0].startswith(SPACE),
    }


def _special(tokenizer: Any, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The numbers of special tokens, and which of them stand around every text."""
    found: dict[str, Any] = {name: getattr(tokenizer, key) for name, key in _SPECIAL.items()}
    if found["padding"] == found["eos"]:  # what stands in where there is none
        found["padding"] = None
    ends = config.get("eos_token_id")
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if i is not None]
    found["eos"] = found["eos"] if found["eos"] is not None else next(iter(ends), None)
    more = [i for i in ends if i != found["eos"]]
    found |= dict(zip(_ENDS, more, strict=False))
    if len(more) > len(_ENDS):
        warn(f"{source}: of the tokens that end a text, GGUF has no place for {', '.join(map(str, more[len(_ENDS) :]))}.")
    inner, whole = (tokenizer("x", add_special_tokens=given)["input_ids"] for given in (False, True))
    at = next((i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner), None)
    before, after = (whole[:at], whole[at + len(inner) :]) if at is not None else (whole, [])
    if before not in ([], [found["bos"]]) or after not in ([], [found["eos"]]):
        raise InputError(f"{source}: its tokenizer puts tokens around texts that are not bos and eos, which GGUF cannot say.")
    keys: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": number for name, number in found.items() if number is not None}
    return keys | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _template(tokenizer: Any, source: str) -> dict[str, Any]:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        left = sorted(set(template) - {"default"})
        warn(f"{source}: of its chat templates the default one is written, and not {', '.join(left)}.")
        template = template.get("default")
    return {"tokenizer.chat_template": template} if template else {}


def check_tokenizer(path: Path, source: str) -> None:
    """Reads the tokenizer of a written file back.

    Raises:
        InputError: it cuts a text otherwise than the base's.
    """
    if _gguf_file(source) is not None:
        return
    ours, theirs = load_tokenizer(source), tokenizer_from_metadata(read_gguf(path))
    added = [str(token) for token in list(ours.added_tokens_decoder.values())[:8]]
    for text in (*_SAMPLES, " hello".join(added)):
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise InputError(f"{source}: its tokenizer cannot be said in GGUF: the text {text!r} would be cut into other tokens.")
