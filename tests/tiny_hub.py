"""Tiny random model folders, tiny data files and a command line in this process: what an end-to-end test needs, in a second."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from lora_jax.cli import main as cli
from lora_jax.config.load import load_config
from lora_jax.config.schema import Config

WIDTH, HIDDEN, DEPTH, POSITIONS = 32, 64, 3, 64
FILLER = tuple(["a", "film", "of", "the", "and", "plot", "with", "acting", "in", "it", "was", "story", "about", "people", "who"])
WORDS = ("good", "bad", "fine", "poor", "yes", "no", "What", "is", "red", "blue", "Answer", ":", *FILLER)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@dataclasses.dataclass(frozen=True)
class TinyHub:
    """Folders and files, all random and small.

    Attributes:
        bert: an encoder of 3 layers with a pooler and tokenizer.
        llama: a decoder of 3 layers with a tokenizer that has a chat template.
        reviews: a CSV with `text` and `label` (neg, pos), 120 rows; the label follows from a word of the text.
        questions: JSON lines with `prompt`, `response` and `messages`, 60 rows.
        tags: JSON lines with `words` and `labels` (O, B-COLOR, I-COLOR), 60 rows; a label follows from its word.
        facts: JSON lines as SQuAD has them (`context`, `question`, `answers`), 60 rows; the answer is the one word after "is".
    """

    bert: Path
    llama: Path
    reviews: Path
    questions: Path
    tags: Path
    facts: Path

    def values(self, name: str = "tiny", *, causal: bool = False) -> dict[str, Any]:
        """A config as plain values: 6 steps of 8 examples."""
        task: dict[str, Any] = {"kind": "classification", "source": str(self.reviews), "text": "text", "label": "label"}
        if causal:
            task = {"kind": "causal_lm", "source": str(self.questions), "prompt": "prompt", "response": "response"}
        return {
            "name": name,
            "model": {"source": str(self.llama if causal else self.bert)},
            "task": task | {"eval_size": 20, "max_length": 24},
            "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "optimizer": {"learning_rate": 0.01},
            "training": {"steps": 6, "batch_size": 8, "eval_every": 3},
            "tracking": {"log_every": 2},
        }

    def tagging(self) -> dict[str, Any]:
        """A config's task section: classes of words."""
        return {"kind": "token_classification", "source": str(self.tags), "text": "words", "label": "labels", "eval_size": 20}

    def answering(self) -> dict[str, Any]:
        """A config's task section: answers in texts, of which one in three takes two windows."""
        columns = {"question": "question", "context": "context", "answers": "answers"}
        return {"kind": "question_answering", "source": str(self.facts), **columns, "eval_size": 20, "max_length": 24, "stride": 4}

    def write(self, folder: Path, changes: dict[str, Any] | None = None, *, causal: bool = False, name: str = "tiny") -> Path:
        """A YAML file in `folder` with dotted keys changed (None removes one); its run directories go to `folder/runs`."""
        values = self.values(name, causal=causal)
        values["tracking"]["dir"] = str(folder / "runs")
        for key, value in (changes or {}).items():
            section, _, leaf = key.partition(".")
            if not leaf:
                values[section] = value
            elif value is None:
                values[section].pop(leaf, None)
            else:
                values.setdefault(section, {})[leaf] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def config(self, folder: Path, changes: dict[str, Any] | None = None, *, causal: bool = False, name: str = "tiny") -> Config:
        """The same, loaded."""
        return load_config(self.write(folder, changes, causal=causal, name=name))


@dataclasses.dataclass(frozen=True)
class Called:
    """What a call of the command line came to."""

    code: int
    out: str
    err: str


def call(*arguments: Any) -> Called:
    """`lora-jax ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lora-jax", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as left:
            code = left.code or 0
    return Called(code, out.getvalue(), err.getvalue())


def write_hub(folder: Path) -> TinyHub:
    """Writes everything below `folder`."""
    names = ("bert", "llama", "reviews.csv", "questions.jsonl", "tags.jsonl", "facts.jsonl")
    hub = TinyHub(*(folder / name for name in names))
    _write_bert(hub.bert)
    write_llama(hub.llama)
    rng = np.random.default_rng(0)
    rows = [_review(rng, i) for i in range(120)]
    hub.reviews.write_text(
        "text,label,kind\n" + "".join(f"{text},{label},{'plot' if i % 10 == 0 else 'review'}\n" for i, (text, label) in enumerate(rows))
    )
    with hub.questions.open("w") as file:
        for i in range(60):
            prompt, response = f"What is {_words(rng, 1 + i % 7)} :", f"{'red' if i % 2 else 'blue'} {_words(rng, 1 + i % 4)}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            file.write(json.dumps({"prompt": prompt, "response": response, "messages": messages}) + "\n")
    hub.tags.write_text("".join(json.dumps(_tags(rng)) + "\n" for _ in range(60)))
    hub.facts.write_text("".join(json.dumps(_fact(rng, i)) + "\n" for i in range(60)))
    return hub


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(FILLER[i] for i in rng.integers(0, len(FILLER), count))


def _review(rng: np.random.Generator, number: int) -> tuple[str, str]:
    word, label = [("good", "pos"), ("bad", "neg"), ("fine", "pos"), ("poor", "neg")][number % 4]
    return f"{_words(rng, int(rng.integers(1, 9)))} {word} {_words(rng, int(rng.integers(1, 9)))}", label


def _tags(rng: np.random.Generator) -> dict[str, list[str]]:
    labels = {"red": "B-COLOR", "blue": "I-COLOR"}
    words = [word for _ in range(3) for word in (*_words(rng, int(rng.integers(1, 4))).split(), "red", *["blue"] * int(rng.integers(0, 2)))]
    return {"words": words, "labels": [labels.get(word, "O") for word in words]}


def _fact(rng: np.random.Generator, number: int) -> dict[str, Any]:
    answer = ("red", "blue", "good", "bad")[number % 4]
    before, after = _words(rng, int(rng.integers(1, 5))), _words(rng, 20 if number % 3 == 0 else int(rng.integers(1, 5)))
    start = len(f"{before} is ")
    return {
        "context": f"{before} is {answer} {after} {number}",
        "question": "What is it",
        "answers": {"text": [answer], "answer_start": [start]},
    }


def _tokenizer(
    folder: Path, first: tuple[str, ...], unknown: str, special: tuple[str, ...] = (), words: tuple[str, ...] = WORDS
) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*first, *special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*first, *special)])
    return tokenizer


def _write_bert(folder: Path) -> None:
    folder.mkdir(parents=True)
    first = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer = _tokenizer(folder, first, "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = len(first) + len(WORDS)
    config = {
        "model_type": "bert", "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": HIDDEN, "num_hidden_layers": DEPTH,
        "vocab_size": vocabulary, "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "hidden_act": "gelu",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{name}.weight": (WIDTH, WIDTH), f"{layer}{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}intermediate.dense.weight": (HIDDEN, WIDTH), f"{layer}intermediate.dense.bias": (HIDDEN,)}
        shapes |= {f"{layer}output.dense.weight": (WIDTH, HIDDEN), f"{layer}output.dense.bias": (WIDTH,)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    _write_model(folder, config, shapes, {f"{n}.weight" for n in norms}, {f"{n}.bias" for n in norms})


def write_llama(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """A random decoder of 3 layers, whose tokenizer knows these words."""
    folder.mkdir(parents=True)
    first = ("<unk>", "</s>")
    _tokenizer(folder, first, "<unk>", CHAT_TOKENS, words).save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary = len(first) + len(CHAT_TOKENS) + len(words)
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH, "vocab_size": vocabulary, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, WIDTH)}
    norms = {"model.norm.weight"}
    for i in range(DEPTH):
        layer = f"model.layers.{i}."
        for name, out, inside in (
            ("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.k_proj", WIDTH // 2, WIDTH), ("self_attn.v_proj", WIDTH // 2, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH), ("mlp.gate_proj", HIDDEN, WIDTH), ("mlp.up_proj", HIDDEN, WIDTH),
            ("mlp.down_proj", WIDTH, HIDDEN),
        ):  # fmt: skip
            shapes[f"{layer}{name}.weight"] = (out, inside)
        norms |= {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"}
    _write_model(folder, config, shapes, norms, set())


def _write_model(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ones: set[str], zeros: set[str]) -> None:
    rng = np.random.default_rng(1)
    weights = {name: (0.3 if len(shape) == 1 else 1 / np.sqrt(shape[-1])) * rng.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {name: 1 + 0.1 * rng.standard_normal(WIDTH) for name in sorted(ones)} | {
        name: 0.1 * rng.standard_normal(WIDTH) for name in sorted(zeros)
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
