"""Regular expressions of strangers: those that never end and those that are too long are refused, wherever a pattern is matched."""

from __future__ import annotations

import time

import pytest
from flax import nnx

from lora_jax import InputError, LoraConfig, inject
from lora_jax.config import patterns
from lora_jax.config.patterns import Patterns, fullmatch
from tests import tiny

ENDLESS = r"((.|.)+)+(?<=\d\d)"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(patterns, "TIMEOUT", 0.2)


def test_matching_is_that_of_re():
    assert fullmatch(r"(.*\.)?(q_proj)", "layers.0.q_proj", "here") and not fullmatch(r"q_proj", "layers.0.q_proj", "here")
    assert Patterns("here").match(r"layers\.(?P<i>\d+)", "layers.12.mlp", whole=False)["i"] == "12"


@pytest.mark.parametrize("text", ["(", "*", "(?P<a>x)(?P<a>y)", "x" * (patterns.LONGEST + 1)])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(InputError, match=r"a file: 'key'"):
        Patterns("a file").check("key", text)


@pytest.mark.parametrize("values", [{"targets": ENDLESS}, {"targets": "all-linear", "rank_pattern": {ENDLESS: 2}}])
def test_a_config_with_a_pattern_that_never_ends(values):
    began = time.process_time()
    with pytest.raises(InputError, match=f"adapter.{list(values)[-1]}"):
        inject(tiny.decoder(2), LoraConfig(**values), rngs=nnx.Rngs(0))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["((((a{99}){99}){99}){99}){99}", "a{9999999}", "(a{1000}){1000}", "(?:foo){e<=3}", "(ab{9,}){90000}"])
def test_repetitions_are_bounded_before_anything_is_compiled(text, monkeypatch):
    monkeypatch.setattr(patterns.regex, "compile", None)
    monkeypatch.setattr(patterns.regex, "fullmatch", None)
    with pytest.raises(InputError, match="a file: 'rank_pattern'"):
        Patterns("a file").check("rank_pattern", text)
    with pytest.raises(InputError, match="a file"):
        fullmatch(text, "layers.0", "a file")
    with pytest.raises(InputError, match="LoraConfig: 'rank_pattern'"):
        LoraConfig(rank_pattern={text: 2})
    with pytest.raises(InputError, match="adapter.targets"):
        inject(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), LoraConfig(targets=text), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("text", [r"layers\.\d{1,2}\.(q|v)_proj", r"\{9999999\}", "x" * 9000, r"a{3}b{2,}"])
def test_patterns_of_people_are_within_bounds(text):
    Patterns("a file").check("key", text)


@pytest.mark.parametrize(
    "values", [{"rank": 10**9}, {"rank": 1e30}, {"rank_pattern": {"0": 10**9}}, {"layers": "0-999999999999"}, {"alpha": 1e300}]
)
def test_huge_numbers_are_refused_at_once(values):
    began = time.process_time()
    with pytest.raises(InputError):
        inject(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), LoraConfig(targets="all-linear", **values), rngs=nnx.Rngs(0))
    assert time.process_time() - began < 2


def test_pefts_words_are_taken():
    config = LoraConfig(r=4, lora_alpha=8, target_modules={"v_proj", "q_proj"}, lora_dropout=0.1, use_rslora=True)
    assert config == LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.1, rslora=True)
    with pytest.warns(UserWarning, match="alpha is 16 where lora_alpha is not given; PEFT's default is 8"):
        LoraConfig(r=4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rnk": 4}, "'rnk'. Did you mean 'rank'"),
        ({"r": 4, "rank": 4}, "'rank' is given twice"),
        ({"use_dora": True}, "'use_dora' is an option of PEFT's"),
        ({"lora_alpa": 4}, "Did you mean 'lora_alpha'"),
        ({"r": 0, "lora_alpha": 1}, "'rank'.*greater than 0"),
        ({"dropout": 1.5}, "'dropout'.*less than 1.*1.5"),
    ],
)
def test_a_key_or_value_that_will_not_do(values, told):
    with pytest.raises(InputError, match=told):
        LoraConfig(**values)
