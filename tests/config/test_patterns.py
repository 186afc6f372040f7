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
