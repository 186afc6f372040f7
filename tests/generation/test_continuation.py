"""Batches that grow past the context of longrope positions, against all of their tokens run anew for each further one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax.adapters.bank import AdapterBank
from lora_jax.generation.decoding import Decoding, DecodingParams
from lora_jax.generation.generate import Generator, padded
from lora_jax.generation.sampling import Sampling, choose, row_seeds
from lora_jax.models.layers import LayerType
from lora_jax.models.positions import Rotary
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
CONTEXT, NEW = 16, 8
GREEDY = Sampling()
LONGROPE = Rotary(8, kind="longrope", context=CONTEXT, short=(1.0, 1.1, 1.3, 1.7), long=(3.0, 5.0, 7.0, 9.0), magnitude=1.2)


def _prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, tiny.VOCAB, n).tolist() for n in lengths]


def _model(*kinds, seed=0):
    model = tiny.decoder(2, tied=False, seed=seed)
    model.config = nnx.static(dataclasses.replace(model.config, layer_types=kinds or (LayerType(None, LONGROPE),)))
    return model


def _anew(model, prompts, new, sampling=GREEDY):
    """The tokens that follow, each chosen after all the batch's tokens so far have been run without a cache."""
    graphdef, state = nnx.split(model, graph=True)
    logits = jax.jit(lambda state, *rows: nnx.merge(graphdef, state)(*rows))
    rows, places = [list(p) for p in prompts], np.arange(32)
    params, seeds = sampling.params(tiny.VOCAB), row_seeds(0, len(rows))
    for count in range(new):
        lengths = np.array([len(r) for r in rows])[:, None]
        tokens = np.array([r + [0] * (len(places) - len(r)) for r in rows], np.int32)
        out = logits(state, tokens, (places < lengths).astype(np.int32), np.minimum(places, lengths - 1))
        chosen = choose(sampling.method, out[jnp.arange(len(rows)), lengths[:, 0] - 1], params, seeds, jnp.int32(count))
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
    return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


def _tokens(outputs):
    return [o.tokens for o in outputs]


@pytest.fixture(autouse=True)
def quickly():
    """Nearly all of the time here is compiling."""
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def model():
    return _model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@pytest.fixture
def passes(monkeypatch):
    """How long the longest row was in each pass over all of a batch's rows after the first."""
    lengths, again = [], Decoding.recompute

    def counted(self, decoded, tokens, mask, params, method, length, total):
        lengths.append(length)
        return again(self, decoded, tokens, mask, params, method, length, total)

    monkeypatch.setattr(Decoding, "recompute", counted)
    return lengths


@pytest.mark.parametrize("longest", [CONTEXT - 3, CONTEXT - 1, CONTEXT, CONTEXT + 1])
@pytest.mark.parametrize("others", [(), (9, 2)], ids=["alone", "batch"])
def test_every_key_has_the_factors_of_the_length_so_far(model, generator, passes, longest, others):
    prompts = _prompts(longest, *others)
    assert _tokens(generator(prompts, max_new_tokens=NEW)) == _anew(model, prompts, NEW)
    assert passes == ([CONTEXT + 1] if longest <= CONTEXT else [])


def test_the_last_token_needs_no_pass(model, generator, passes):
    """Nothing is computed of the last new token, so that a row may be one token longer than the context."""
    prompts = _prompts(CONTEXT - 3)
    for new, more in ((4, []), (5, [CONTEXT + 1])):
        assert _tokens(generator(prompts, max_new_tokens=new)) == _anew(model, prompts, new)
        assert passes == more


@pytest.mark.long
def test_draws_go_on(model, generator, passes):
    prompts, sampling = _prompts(CONTEXT - 2, 5), Sampling(1.5, 20)
    assert _tokens(generator(prompts, max_new_tokens=NEW, temperature=1.5, top_k=20)) == _anew(model, prompts, NEW, sampling)
    assert len(passes) == 1


def test_the_stream_is_the_result(generator, passes):
    prompts, heard = _prompts(CONTEXT - 2, 5), []
    outputs = generator(prompts, max_new_tokens=NEW)
    assert outputs == generator(prompts, max_new_tokens=NEW, stream=lambda row, piece: heard.append((row, *piece)))
    assert [[t for r, t in heard if r == row] for row in (0, 1)] == _tokens(outputs)
    assert passes == [CONTEXT + 1] * 2


def test_rows_that_have_ended(generator, passes):
    """They stay ended; and where all have, before the context is full or as it is, there is no pass."""
    prompts = _prompts(CONTEXT - 2, 5)
    free = _tokens(generator(prompts, max_new_tokens=NEW))
    stop = free[0][2]
    assert all(stop not in row[:2] for row in free) and stop not in free[1]
    outputs = generator(prompts, max_new_tokens=NEW, stop=[stop])
    assert _tokens(outputs) == [free[0][:3], free[1]] and outputs[0].ended and len(passes) == 2
    for count in (2, 3):
        ends = [row[count - 1] for row in free]
        assert all(o.ended and len(o.tokens) <= count for o in generator(prompts, max_new_tokens=NEW, stop=ends))
    assert len(passes) == 2


@pytest.mark.slow
def test_layers_of_several_contexts_and_windows(passes):
    """A pass at each border; and the cache may be a rolling one."""
    other = dataclasses.replace(LONGROPE, context=CONTEXT + 3)
    for kinds in ((LayerType(5, LONGROPE), LayerType(4, other)), (LayerType(None, LONGROPE), LayerType(4, other))):
        windowed, prompts = _model(*kinds), _prompts(CONTEXT - 1, 3)
        assert windowed.borders == (CONTEXT, CONTEXT + 3)
        assert _tokens(Generator(windowed)(prompts, max_new_tokens=NEW)) == _anew(windowed, prompts, NEW)
    assert passes == [CONTEXT + 1, CONTEXT + 4] * 2


@pytest.mark.long
def test_rows_with_adapters_of_their_own(model, passes):
    bank = AdapterBank(model)
    bank.add("one", tiny.trained(model, 1, targets="all-linear"))
    mixed, prompts = bank.mixed(["one", None, "one"]), _prompts(CONTEXT - 1, 7, 3)
    assert _tokens(lora_jax.generate(mixed, prompts, max_new_tokens=NEW)) == _anew(mixed, prompts, NEW)
    assert len(passes) == 1


@pytest.mark.long
def test_members_at_once(model, passes):
    members = [tiny.trained(model, seed, targets="all-linear", rank=2) for seed in (1, 2)]
    generator, prompts = Generator(members), _prompts(CONTEXT - 1, 7)
    together = generator(prompts, max_new_tokens=NEW)
    assert len(passes) == 1 and generator.decoding.programs.recompute.count == 1
    assert [_tokens(m) for m in together] == [_anew(m, prompts, NEW) for m in members]
    assert together[0] != together[1]


def test_one_program_for_all_prompts_of_a_shape(generator):
    programs = generator.decoding.programs
    generator(_prompts(CONTEXT - 1, 7, 3, 3), max_new_tokens=NEW)
    before = programs.recompute.count
    generator(_prompts(CONTEXT, 1, 2, 3), max_new_tokens=4)
    Generator(_model(seed=3))(_prompts(CONTEXT - 4, 1, 2, 3), max_new_tokens=NEW)
    assert programs.recompute.count == before > 0


def test_dynamic_keeps_what_is_in_the_cache(passes):
    """As transformers does; its frequencies change with each token, so that else each token would take a pass."""
    dynamic = _model(LayerType(None, Rotary(8, kind="dynamic", context=CONTEXT, factor=4.0)))
    generator = Generator(dynamic)
    generator(_prompts(CONTEXT - 1), max_new_tokens=NEW)
    assert dynamic.borders == () and passes == [] and generator.decoding.programs.recompute.count == 0


def test_a_pass_writes_into_the_old_cache(generator):
    decoding, (tokens, mask) = generator.decoding, padded(_prompts(CONTEXT, 4), 0, right=False)
    params = DecodingParams(GREEDY.params(tiny.VOCAB), row_seeds(0, 2), jnp.full(8, -1, jnp.int32), jnp.int32(0))
    decoded = decoding.start(tokens, mask, params, "greedy", 16, 32)
    arguments = decoding.prefill_arrays.own, decoding.prefill_arrays.shared, decoded, tokens, mask, params, "greedy", CONTEXT + 1, 32
    memory = decoding.programs.run_again.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(a.nbytes for a in (*decoded.cache.keys, *decoded.cache.values))
