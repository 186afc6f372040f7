"""Encoder-decoders against transformers on PyTorch: logits, decoding, adapters of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from flax import nnx

import lora_jax
from lora_jax.interop.hf import save_pretrained
from lora_jax.models.positions import Buckets, sinusoids
from tests import tiny
from tests.interop.drawing import drawn
from tests.interop.test_peft_files import as_sets, assert_same_files
from tests.interop.zoo import ZOO, Zoo

pytestmark = pytest.mark.interop

NAMES = [name for name, entry in ZOO.items() if entry.head == "AutoModelForSeq2SeqLM"]


def some(values: Any, quick: tuple[str, ...]) -> list[Any]:
    """All of them, `long` but for some."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.long) for value in values]


TOLERANCE = 1e-4  # absolute, float32
NEW = 32


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def padded(name: str, lengths: tuple[int, ...], *, target: bool, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Random texts, padded: tokens and mask."""
    options = ZOO[name].options
    vocab = options.get("decoder_vocab_size", options["vocab_size"]) if target else options["vocab_size"]
    rng = np.random.default_rng([len(name), target])
    tokens, mask = (np.zeros((len(lengths), max(lengths)), np.int32) for _ in range(2))
    for row, length in enumerate(lengths):
        own = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        tokens[row, own], mask[row, own] = rng.integers(3, vocab, length), 1
    return tokens, mask


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(zoo: Zoo, name: str):
    tokens, mask = padded(name, (23, 9, 17, 1), target=False)
    fed, seen = padded(name, (11, 19, 1, 7), target=True)
    given = {"attention_mask": mask, "decoder_input_ids": fed, "decoder_attention_mask": seen}
    with torch.no_grad():
        expected = zoo.model(name)(torch.tensor(tokens).long(), **{k: torch.tensor(v).long() for k, v in given.items()}).logits.numpy()
    model = lora_jax.load_model(str(zoo.source(name)))
    ours = tiny.outputs(model, *map(jnp.asarray, (tokens, fed, mask, seen)))
    print(f"{name}: {np.abs(ours - expected)[seen == 1].max():.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours[seen == 1], expected[seen == 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (32, 1000), (64, 200)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_equal_transformers(count: int, longest: int, causal: bool):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-2000, 2001)
    options = {"bidirectional": not causal, "num_buckets": count, "max_distance": longest}
    theirs = T5Attention._relative_position_bucket(torch.tensor(-distance), **options).numpy()
    assert Buckets(count, longest, causal).of(distance).tolist() == theirs.tolist()


def test_sines_and_cosines_equal_transformers():
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    for width in (32, 33):
        theirs = MarianSinusoidalPositionalEmbedding(50, width)
        assert np.array_equal(sinusoids(50, width), theirs.create_weight().numpy())


def greedy(zoo: Zoo, name: str, tokens: np.ndarray, mask: np.ndarray, new: int = NEW, **options: object) -> list[list[int]]:
    """transformers' tokens after the start, none of which ends a row."""
    return greedy_of(zoo.model(name), tokens, mask, new, **options)


def greedy_of(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None, new: int = 8, **options: object) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    mask = np.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(mask), "max_new_tokens": new, "do_sample": False, "num_beams": 1, **options}
        return model.generate(torch.tensor(tokens).long(), **given)[:, 1:].tolist()


@pytest.mark.parametrize("name", some(NAMES, ("t5", "bart")))
def test_32_greedy_tokens_equal_transformers(zoo: Zoo, name: str):
    tokens, mask = padded(name, (12, 7, 3), target=False)
    rows = [row[:n].tolist() for row, n in zip(tokens, mask.sum(1), strict=True)]
    outputs = lora_jax.generate(lora_jax.load_model(str(zoo.source(name))), rows, max_new_tokens=NEW, stop=[])
    assert [o.tokens for o in outputs] == greedy(zoo, name, tokens, mask)
    assert all(len(o.tokens) == NEW for o in outputs)
    assert len({tuple(o.tokens) for o in outputs}) > 1 or "scale_embedding" in ZOO[name].options  # which drowns all else


def test_the_language_is_forced(zoo: Zoo):
    tokens, mask = padded("mbart", (9,), target=False)
    options: Any = {"decoder_start_token_id": 4, "forced_bos_token_id": 8}
    output = lora_jax.generate(lora_jax.load_model(str(zoo.source("mbart"))), tokens.tolist(), max_new_tokens=8, stop=[], **options)[0]
    assert [output.tokens] == greedy(zoo, "mbart", tokens, mask, 8, **options) and output.tokens[0] == 8


# Of transformers' `generate`; the first with its defaults.
BEAMS = [
    {},
    {"length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3},
    {"length_penalty": -0.5, "early_stopping": "never", "no_repeat_ngram_size": 2},
]


def check_beams(zoo: Zoo, name: str, rows: list[list[int]], options: dict, *, crossed: bool) -> None:
    """Beams of 4 against transformers', with a token that ends rows often."""
    model, reference = lora_jax.load_model(str(zoo.source(name))), zoo.model(name)
    end = lora_jax.generate(model, rows[:1], max_new_tokens=8, stop=[])[0].tokens[5]
    length = max(map(len, rows))
    left = [] if crossed else [length - len(row) for row in rows]
    tokens, mask = np.zeros((2, len(rows), length), np.int64)
    for i, row in enumerate(rows):
        start = 0 if crossed else left[i]
        tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    asked = {"num_beams": 4, "max_new_tokens": 16, **options}
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(mask), "eos_token_id": end, "pad_token_id": 0, "do_sample": False}
        expected = reference.generate(torch.tensor(tokens), **given, **asked)[:, 1 if crossed else length :].tolist()
    expected = [row[: row.index(end) + 1] if end in row else row[:16] for row in expected]
    assert [o.tokens for o in lora_jax.generate(model, rows, stop=[end], **asked)] == expected
    assert len({len(row) for row in expected}) > 1 or name != "bart" or options  # some end before they have to


def cases(names: list[str], quick: dict[str, int]) -> list[Any]:
    """Each name with each of the options; `long` but for some."""
    every = [(name, number) for name in names for number in range(len(BEAMS))]
    marks = [() if quick.get(name) == number else pytest.mark.long for name, number in every]
    return [pytest.param(name, BEAMS[i], marks=mark, id=f"{name}-{i}") for (name, i), mark in zip(every, marks, strict=True)]


@pytest.mark.parametrize(
    ("name", "options"), cases(["bart", "t5-gated", "mbart-scaled", "marian", "pegasus", "t5"], {"bart": 0, "t5-gated": 1})
)
def test_beams_of_encoder_decoders_equal_transformers(zoo: Zoo, name: str, options: dict):
    tokens, mask = padded(name, (12, 7, 3), target=False)
    check_beams(zoo, name, [row[:n].tolist() for row, n in zip(tokens, mask.sum(1), strict=True)], options, crossed=True)


@pytest.mark.parametrize(("name", "options"), cases(["llama-gqa-bias", "gpt2", "gemma2"], {"llama-gqa-bias": 2}))
def test_beams_of_decoders_equal_transformers(zoo: Zoo, name: str, options: dict):
    rng = np.random.default_rng(3)
    check_beams(zoo, name, [rng.integers(3, 128, n).tolist() for n in (12, 7, 3)], options, crossed=False)


# Options of `peft.LoraConfig`: T5's modules, and those of BART and its kin.
PEFT = {
    "attention": ({"target_modules": ["q", "v"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "all": (
        {"target_modules": "all-linear", "rank_pattern": {"EncDecAttention.k": 2, r"encoder\.block\.1\.layer\.0\..*": 6}},
        {"target_modules": "all-linear", "bias": "all", "rank_pattern": {"encoder_attn.k_proj": 2}, "alpha_pattern": {"fc1": 5}},
    ),
    "layers": (
        {"target_modules": ["wi_0", "wo", "o"], "layers_to_transform": [1], "layers_pattern": "block", "use_rslora": True},
        {"target_modules": ["out_proj"], "layers_to_transform": [0], "modules_to_save": ["lm_head"], "bias": "lora_only"},
    ),
}


def their_logits(model, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(sources).long(), decoder_input_ids=torch.tensor(targets).long()).logits.numpy()


def our_logits(model, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    with jax.disable_jit():
        return np.asarray(model(jnp.asarray(sources), jnp.asarray(targets)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", some(PEFT, ("all",)))
@pytest.mark.parametrize("name", some(["t5-gated", "bart", "pegasus"], ("t5-gated", "bart")))
def test_adapters_from_peft_and_back(zoo: Zoo, name: str, case: str, tmp_path: Path):
    options = PEFT[case][0 if name.startswith("t5") else 1]
    torch.manual_seed(1)
    model = peft.get_peft_model(zoo.model(name), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    (sources, _), (targets, _) = padded(name, (9, 9), target=False), padded(name, (6, 6), target=True)
    expected = their_logits(model, sources, targets)
    with model.disable_adapter():
        assert np.abs(their_logits(model, sources, targets) - expected).max() > 0.02
    ours = lora_jax.load_peft(lora_jax.load_model(str(zoo.source(name))), tmp_path / "theirs")
    assert np.abs(our_logits(ours, sources, targets) - expected).max() < TOLERANCE
    lora_jax.save_peft(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["t5", "mbart", "marian"], ("mbart",)))
def test_adapters_to_peft(zoo: Zoo, name: str, tmp_path: Path):
    """On the last layer of the encoder and on all of the decoder."""
    config = lora_jax.LoraConfig(rank=3, targets="all-linear", layers="encoder:last:1, decoder:all", alpha_pattern={"q_proj": 5.5})
    ours = drawn(lora_jax.inject(lora_jax.load_model(str(zoo.source(name))), config, rngs=nnx.Rngs(0)))
    lora_jax.save_peft(ours, tmp_path / "ours")
    assert as_sets(tmp_path / "ours")["task_type"] == "SEQ_2_SEQ_LM"
    model = peft.PeftModel.from_pretrained(zoo.model(name), str(tmp_path / "ours")).eval()
    (sources, _), (targets, _) = padded(name, (9, 9), target=False), padded(name, (6, 6), target=True)
    assert np.abs(our_logits(ours, sources, targets) - their_logits(model, sources, targets)).max() < TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["t5", "t5-gated", "bart", "marian-two-vocabularies", "pegasus"], ("t5",)))
def test_a_merged_checkpoint_is_what_transformers_loads(zoo: Zoo, name: str, tmp_path: Path):
    """With an adapter on the embedding too, from which the projection then parts."""
    base = lora_jax.load_model(str(zoo.source(name)))
    targets = r".*(q_proj|down_proj)|embed" if name in ("t5", "bart") else "attention"
    ours = drawn(lora_jax.inject(base, lora_jax.LoraConfig(rank=3, targets=targets), rngs=nnx.Rngs(0)))
    save_pretrained(ours, tmp_path / "merged")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    (sources, _), (fed, _) = padded(name, (9, 9), target=False), padded(name, (6, 6), target=True)
    expected = our_logits(ours, sources, fed)
    assert np.abs(their_logits(model, sources, fed) - expected).max() < TOLERANCE
    assert np.abs(our_logits(lora_jax.load_model(str(tmp_path / "merged")), sources, fed) - expected).max() < TOLERANCE
    again = greedy_of(model, sources)
    assert [o.tokens for o in lora_jax.generate(ours, sources.tolist(), max_new_tokens=8, stop=[])] == again
