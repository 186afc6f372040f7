"""GGUF files of every decoder family against transformers: tiny random models, and the real Gemma 3 270M.

transformers' GGUF reader knows no Gemma 1, Granite, OLMo 2, SmolLM3 and GPT-NeoX, and gives Gemma 2 and 3 the scale of scores of one
size of model. So logits are compared with the model that was converted, and tensors with what transformers reads of the file where it can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from tokenizers.pre_tokenizers import ByteLevel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import lora_jax
from lora_jax.models.families import gguf_architectures
from lora_jax.weights.load import open_checkpoint, resolve
from tests import tiny
from tests.gguf_files import write_gguf
from tests.interop.zoo import VOCAB, ZOO, Zoo

pytestmark = pytest.mark.interop

CONVERTED = ["llama-gqa-bias", "mistral-wide-heads", "qwen2", "qwen3", "granite", "gemma-mqa", "gemma2", "gemma3-scaled", "phi3-longrope",
             "olmo2", "smollm3", "gpt2", "gpt_neox"]  # fmt: skip
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
# Files say nothing of how the scores of a Gemma are scaled.
CHANGED = {"gemma2": {"query_pre_attn_scalar": 16}}
# What the converter leaves to the file's own keys.
EXTRA = {
    "gemma3-scaled": {"gemma3.attention.sliding_window_pattern": [True, False, True], "gemma3.rope.freq_base_swa": 100.0},
}


ALPHABET = sorted(ByteLevel.alphabet())[: VOCAB - 1]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*ALPHABET, ALPHABET[0] + ALPHABET[1]],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": [f"{ALPHABET[0]} {ALPHABET[1]}"],
    "tokenizer.ggml.eos_token_id": 2,
}


def converted(zoo: Zoo, name: str, file: Path, **options: Any) -> Any:
    """Writes the model as GGUF; the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        zoo.source(name), attn_implementation="eager", dtype=torch.float32, **CHANGED.get(name, {})
    )
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    write_gguf(file, model.config.to_dict(), tensors, extra=TOKENIZER | EXTRA.get(name, {}), **options)
    return model.eval()


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_of_every_family(zoo: Zoo, name: str, tmp_path: Path):
    """Of the model here, and of the checkpoint that it is exported as."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 24))
    with torch.no_grad():
        expected = converted(zoo, name, tmp_path / "m.gguf")(torch.tensor(tokens)).logits.numpy()
    with tiny.quick_compile():
        model = lora_jax.load_model(str(tmp_path / "m.gguf"))
        logits = np.asarray(model(jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The config that was made of the metadata is one that transformers reads, and means the same.
    lora_jax.save_pretrained(model, tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(saved(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONVERTED if ZOO[name].family in READ_BY_TRANSFORMERS])
def test_tensors_are_those_that_transformers_reads(zoo: Zoo, name: str, tmp_path: Path):
    """Quantised, too: every module in another of the kinds whose blocks are as long as these rows.

    It is given the config: of the file it reads no width of Qwen 3's heads, no bias of a Llama, no number of GPT-2's positions.
    """
    kinds = {"attn_q": Q.Q4_0, "attn_k": Q.Q4_1, "attn_v": Q.Q5_0, "attn_qkv": Q.Q5_1, "attn_output": Q.Q8_0, "ffn_gate": Q.Q8_0,
             "ffn_up": Q.BF16, "token_embd": Q.Q8_0}  # fmt: skip
    config = converted(zoo, name, tmp_path / "m.gguf", kinds=kinds).config
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    theirs = {key: value.numpy() for key, value in read.state_dict().items()}
    ours = open_checkpoint(tmp_path / "m.gguf", architectures=gguf_architectures())
    assert set(theirs) - set(ours.names()) <= {"lm_head.weight"}  # tied
    for tensor in ours.names():
        np.testing.assert_array_equal(ours.read(tensor), theirs[tensor], err_msg=tensor)


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


@pytest.fixture(scope="module")
def gemma(gemma3_source: str) -> tuple[Any, Any, Any]:
    """Our model and tokenizer, and transformers' model of the same file."""
    path = resolve(gemma3_source, key="model.source")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return lora_jax.load_model(gemma3_source), lora_jax.load_tokenizer(gemma3_source), theirs


def _padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, padded on the left."""
    length = max(map(len, rows))
    tokens = np.array([[pad] * (length - len(row)) + row for row in rows])
    return tokens, np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def test_gemma3_logits(gemma):
    """Ten texts in three languages."""
    ours, tokenizer, theirs = gemma
    texts = [text for of_language in PROSE.values() for text in of_language]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert len(rows) == 10 and all(row[0] == tokenizer.bos_token_id for row in rows)
    far = 0.0
    for row in rows:
        with torch.no_grad():
            expected = theirs(torch.tensor([row])).logits[0].numpy()
        tokens, mask = _padded([row, [2] * 32], tokenizer.pad_token_id)  # one shape, so that it is compiled once
        logits = np.asarray(
            ours(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.int32), jnp.asarray(np.maximum(mask.cumsum(1) - 1, 0)))
        )
        far = max(far, float(np.abs(logits[0, -len(row) :] - expected).max()))
    print(f"largest difference of a logit: {far:.2e}")
    assert far < 1e-3


def test_gemma3_answers_token_for_token(gemma):
    """48 greedy tokens of ten prompts, in one batch padded on the left."""
    ours, tokenizer, theirs = gemma
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    tokens, mask = _padded(rows, tokenizer.pad_token_id)
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    expected = out[:, tokens.shape[1] :].tolist()
    outputs = lora_jax.generate(ours, PROMPTS, tokenizer, max_new_tokens=48, stop=[])
    for prompt, output, answer in zip(PROMPTS, outputs, expected, strict=True):
        assert output.tokens == answer, (prompt, output.text, tokenizer.decode(answer))
    assert "Paris" in outputs[0].text and "Berlin" in outputs[5].text


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


def test_gemma3_tokens(gemma, gemma3_source: str):
    """200 lines of mixed scripts; each comes back but for what a special token stands for."""
    tokenizer, path = gemma[1], resolve(gemma3_source, key="model.source")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    lines = mixed_lines(200)
    assert len(set(lines)) > 195
    for line in lines:
        ids = tokenizer(line)["input_ids"]
        assert ids == theirs(line)["input_ids"], line
        if "▁" not in line and not any(f"<{name}" in line for name in ("bos", "eos", "unused", "start")):
            assert tokenizer.decode(ids, skip_special_tokens=True) == line
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 1, 0, 3)
    assert tokenizer.special_tokens_map.items() >= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}.items()
    assert len(tokenizer) == len(theirs) == 262144
