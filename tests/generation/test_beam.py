"""Beam search by itself; `tests/interop/test_encoder_decoders.py` compares it with transformers'."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import InputError
from lora_jax.generation.beam import Beams
from tests import tiny, tiny_pairs


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def test_enough_beams_find_the_likeliest_of_all():
    """Three tokens of a vocabulary of five, none of which ends a row: 25 beams lose none of the 125 answers before the last token."""
    model, new = tiny.decoder(2, vocab=5, tied=False), 3
    prompts = np.random.default_rng(0).integers(0, 5, (8, 4))
    answers = np.array(list(itertools.product(range(5), repeat=new)))
    whole = np.concatenate([np.repeat(prompts, len(answers), 0), np.tile(answers, (len(prompts), 1))], axis=1)
    shares = np.asarray(jax.nn.log_softmax(tiny.outputs(model, whole)[:, prompts.shape[1] - 1 : -1]))
    sums = np.take_along_axis(shares, whole[:, -new:, None], -1).sum((1, 2)).reshape(len(prompts), -1)
    found, greedy = (
        [o.tokens for o in lora_jax.generate(model, prompts.tolist(), max_new_tokens=new, stop=[], num_beams=n)] for n in (25, 1)
    )
    assert found == answers[sums.argmax(1)].tolist() and found != greedy


@pytest.mark.slow
def test_members_of_an_encoder_decoder_decode_together():
    base = tiny_pairs.base("t5")
    models = [tiny.trained(base, seed, targets="attention") for seed in (1, 2)]
    prompts, options = [[5, 6, 7, 1], [9, 1]], {"max_new_tokens": 6, "stop": [1]}
    for more in ({}, {"num_beams": 3, "no_repeat_ngram_size": 2}):
        given: Any = options | more
        together = lora_jax.generate(models, prompts, **given)
        assert together == [lora_jax.generate(model, prompts, **given) for model in models]
        assert together[0] != together[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_beams": 0}, "num_beams: must be at least 1"),
        ({"length_penalty": 2.0}, "length_penalty: goes with num_beams"),
        ({"num_beams": 2, "temperature": 0.7}, "neither streams nor samples"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping: must be true, false or 'never'"),
        ({"num_beams": 2, "no_repeat_ngram_size": -1}, "no_repeat_ngram_size: must be at least 0"),
        ({"forced_bos_token_id": 3}, "goes with an encoder-decoder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_options_are_told(options, told):
    with pytest.raises(InputError, match=told):
        lora_jax.generate(tiny.decoder(2), [[1, 2]], **options)


def test_bad_sources_are_told():
    model = tiny_pairs.base("bart", decoder_start_token_id=None)
    for options, told in (
        ({}, "decoder_start_token_id: the checkpoint doesn't say"),
        ({"decoder_start_token_id": 64}, "64 is outside 0..63"),
        ({"max_new_tokens": 65}, "65 tokens exceed the model's 64 positions"),
    ):
        given: Any = options
        with pytest.raises(InputError, match=told):
            lora_jax.generate(model, [[5, 1]], **given)
    with pytest.raises(InputError, match="70 tokens exceed the model's context of 64"):
        lora_jax.generate(model, [[5] * 70], max_new_tokens=4)
    assert Beams() == Beams(1, 1.0, False, 0)
