"""Tokenizers for tiny models, of the two kinds that GGUF files of language models hold."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.weights.gguf_tokenizer import SPACE, SPLITS

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre: str = "gpt-2", size: int = 268) -> Tokenizer:
    """Byte-level BPE whose words are cut by llama.cpp's rule `pre`; a special token, and one that is not."""
    pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("Ġ", "Ġ"), ("1", "9"), ("Ċ", "Ċ")]
    letters = ["Ġ", "Ċ", *(letter for letter in ALPHABET if letter not in "ĠĊ")][: size - 2 - len(pairs)]
    vocabulary = [*letters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=pairs,
            ignore_merges=SPLITS[pre].whole_words,
        )
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre].patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """SentencePiece's BPE as Llama 2 has it: a space before each text, unknown characters as bytes, bos in front."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzT.,"]
    pairs = [(SPACE, "t"), ("h", "e"), (f"{SPACE}t", "he"), ("i", "n"), (SPACE, "a"), ("e", "r"), ("o", "n"), (SPACE, SPACE)]
    vocabulary = [*first, *letters, *(a + b for a, b in pairs)]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in first[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **names: str) -> None:
    """Writes `tokenizer.json` and a config with the chat template and the names of special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
