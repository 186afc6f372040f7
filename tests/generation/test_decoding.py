"""Decoding with a cache against the whole text run anew for each token, and what must not depend on the batch or be compiled twice."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax.adapters.bank import AdapterBank
from lora_jax.errors import InputError
from lora_jax.generation import decoding
from lora_jax.generation.decoding import LENGTHS, DecodingParams, padded_length
from lora_jax.generation.generate import Generator, context_length, padded
from lora_jax.generation.generate import _check as check
from lora_jax.generation.sampling import Sampling, row_seeds
from lora_jax.models.heads import Classifier
from lora_jax.models.layers import HeadShape, LayerType
from lora_jax.models.positions import Rotary
from lora_jax.packing.pack import Pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
NEW = 10


def _prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, tiny.VOCAB, n).tolist() for n in lengths]


def _one_by_one(model, prompt, count):
    """Greedy tokens, each from the whole text so far (padded on the right, so that there is one program)."""
    graphdef, state = nnx.split(model, graph=True)
    logits = jax.jit(lambda state, tokens, mask: nnx.merge(graphdef, state)(tokens, mask))
    text = list(prompt)
    for _ in range(count):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(text)] = text
        text.append(int(np.asarray(logits(state, tokens, (np.arange(32) < len(text))[None]))[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(autouse=True)
def quickly(request):
    """Nearly all of the time here is compiling."""
    with contextlib.nullcontext() if "copies" in request.node.name else tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny.decoder(3, tied=False)  # tied, a random model says its last token again and again


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


def test_greedy_equals_running_the_whole_text_for_each_token(model, generator):
    prompts = _prompts(3, 9, 1)
    outputs = generator(prompts, max_new_tokens=NEW)
    assert [o.tokens for o in outputs] == [_one_by_one(model, p, NEW) for p in prompts]
    assert all(not o.ended and o.text is None for o in outputs)


def test_windows_rolling_and_not():
    """Layers that all have windows keep a window's worth of tokens; with one that has none, all."""
    for kinds in ((LayerType(4, Rotary(8)),), (LayerType(4, Rotary(8)), LayerType(None, Rotary(8)))):
        windowed = tiny.decoder(2, tied=False)
        windowed.config = nnx.static(dataclasses.replace(windowed.config, layer_types=kinds))
        prompts = _prompts(11, 2)
        assert [o.tokens for o in Generator(windowed)(prompts, max_new_tokens=NEW)] == [_one_by_one(windowed, p, NEW) for p in prompts]


def test_rows_end_by_themselves(generator):
    prompts = _prompts(3, 9, 1)
    free = [o.tokens for o in generator(prompts, max_new_tokens=NEW)]
    stop = free[1][3]
    outputs = generator(prompts, max_new_tokens=NEW, stop=[stop, 999_999])
    for output, whole in zip(outputs, free, strict=True):
        ends = whole.index(stop) + 1 if stop in whole else NEW
        assert output.tokens == whole[:ends] and output.ended == (stop in whole)
    assert outputs[1].ended and len(outputs[1].tokens) <= 4


def test_nothing_is_compiled_again_for_other_numbers(model, generator):
    """One trace of each program for a shape and method, whatever the prompts, lengths in the same bucket, numbers, seeds and stops."""
    generator(_prompts(5, 2), max_new_tokens=6, temperature=0.7, top_k=5)
    programs = generator.decoding.programs
    before = programs.prefill.count, programs.decode.count
    generator(_prompts(16, 1, seed=4), max_new_tokens=13, temperature=1.3, top_p=0.4, seed=[3, 3], stop=[1, 2])
    Generator(tiny.decoder(3, seed=8, tied=False))(_prompts(7, 7), max_new_tokens=2, temperature=0.2, top_k=1)
    generator(_prompts(5, 2), max_new_tokens=6, temperature=0.7, top_k=5, stream=lambda row, piece: None)
    assert (programs.prefill.count, programs.decode.count) == before
    generator(_prompts(17, 2), max_new_tokens=6, temperature=0.7, top_k=5)
    assert (programs.prefill.count, programs.decode.count) == (before[0] + 1, before[1] + 1)


def test_a_row_draws_by_its_own_seed_alone(generator):
    prompts = _prompts(4, 6, 5)
    options = {"max_new_tokens": NEW, "temperature": 1.0}
    together = [o.tokens for o in generator(prompts, **options, seed=5)]
    assert together == [o.tokens for o in generator(prompts, **options, seed=[5, 6, 7])]
    turned = generator([prompts[2], prompts[0], prompts[1]], **options, seed=[7, 5, 6])
    assert [o.tokens for o in turned] == [together[2], together[0], together[1]]
    same = [o.tokens for o in generator([prompts[0]] * 3, **options, seed=[5, 5, 6])]
    assert same[0] == same[1] == together[0] != same[2]


def test_the_stream_is_the_result(generator):
    prompts = _prompts(3, 9, 1)
    stop = generator(prompts, max_new_tokens=NEW)[0].tokens[4]
    heard = []
    outputs = generator(prompts, max_new_tokens=NEW, stop=[stop], stream=lambda row, piece: heard.append((row, piece)))
    assert outputs == generator(prompts, max_new_tokens=NEW, stop=[stop])
    for row, output in enumerate(outputs):
        assert [t for r, piece in heard if r == row for t in piece] == output.tokens
    assert [row for row, _ in heard[:6]] == [0, 1, 2, 0, 1, 2]  # as they come


def test_rows_with_adapters_of_their_own(model):
    bank = AdapterBank(model)
    bank.add("one", tiny.trained(model, 1, targets="all-linear", layers="last:2"))
    bank.add("two", tiny.trained(model, 2, targets=["q_proj"], rank=2))
    prompts, rows = _prompts(4, 8, 6, 3), ["two", None, "one", "two"]
    mixed = [o.tokens for o in lora_jax.generate(bank.mixed(rows), prompts, max_new_tokens=NEW)]
    for name in ("one", "two", None):
        alone = [o.tokens for o in lora_jax.generate(bank.use(name), prompts, max_new_tokens=NEW)]
        assert [mixed[i] for i, n in enumerate(rows) if n == name] == [alone[i] for i, n in enumerate(rows) if n == name]
        assert alone != mixed


@pytest.mark.long
def test_all_members_of_a_pack_at_once(model):
    """The members' models share the base: it is in the program once, and each member says what it says alone."""
    configs = [tiny.config(adapter__rank=r, adapter__targets=t, training__seed=r) for r, t in ((1, "attention"), (3, "all-linear"))]
    pack = Pack.build(model, configs, 1)
    noise = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape), pack.state.trainable)
    settings, frozen = pack.fixed.settings, pack.part.frozen
    members = [
        pack.part.merge(*(jax.tree.map(lambda a, i=i: a[i], t) for t in (noise, settings)), frozen, training=False) for i in range(2)
    ]
    generator, prompts = Generator(members), _prompts(4, 7)
    together = generator(prompts, max_new_tokens=NEW)
    assert [[o.tokens for o in m] for m in together] == [[o.tokens for o in Generator(m)(prompts, max_new_tokens=NEW)] for m in members]
    assert together[0] != together[1]
    own = {path[-1] for path, _ in nnx.to_flat_state(generator.decoding.decode_arrays.own)}
    assert own <= {"lora_a", "lora_b", "scale"}
    with pytest.raises(ValueError, match="one structure"):
        Generator([members[0], model])


def test_a_step_copies_neither_weights_nor_cache():
    """The whole loop of decoding has less scratch than one layer's weights, and gives the cache back in the arrays it came in."""
    big = tiny.decoder(4, width=128, vocab=512)
    big_decoding = Generator(big).decoding
    tokens, mask = padded(_prompts(5, 2), 0, right=False)
    params = DecodingParams(Sampling().params(512), row_seeds(0, 2), jnp.full(8, -1, jnp.int32), jnp.int32(0))
    decoded = big_decoding.start(tokens, mask, params, "greedy", 16, 4096)
    arranged = big_decoding.decode_arrays
    lowered = big_decoding.programs.advance.lower(arranged.own, arranged.shared, decoded, params, jnp.int32(5), "greedy")
    memory = lowered.compile().memory_analysis()
    layer = sum(a.nbytes for a in jax.tree.leaves(nnx.state(big.layers))) / 4
    cache = sum(a.nbytes for a in (*decoded.cache.keys, *decoded.cache.values))
    assert memory.alias_size_in_bytes >= cache > 4 * layer
    assert memory.temp_size_in_bytes < layer, (memory.temp_size_in_bytes, layer)


def test_layers_share_the_stacked_weights_memory(model):
    """What decoding runs layer by layer are views of the model's own arrays, where each is aligned as XLA asks."""
    big = tiny.decoder(2, width=64)
    stacked = big.layers.segments[0].block.mlp.up_proj.kernel.get_value()
    further = Generator(big).decoding.decode_arrays.shared
    slices = [v.get_value() for path, v in nnx.to_flat_state(further) if path[-3:] == ("mlp", "up_proj", "kernel")]
    start = stacked.unsafe_buffer_pointer()
    assert [s.unsafe_buffer_pointer() - start for s in slices] == [0, stacked.nbytes // 2]


@pytest.mark.slow
def test_where_layers_are_scanned_the_tokens_are_the_same(model, generator, monkeypatch):
    """What an accelerator runs: one scan over stacked weights and a stacked cache, here on a CPU."""
    monkeypatch.setattr(decoding, "on_one_cpu", lambda model: False)
    prompts = _prompts(3, 9, 1)
    adapted = tiny.trained(model, 4, layers="last:2")  # two segments
    scanned = Generator(adapted)
    assert len(scanned.decoding.decode_arrays.layers) == 2
    got = [o.tokens for o in scanned(prompts, max_new_tokens=NEW)]
    monkeypatch.undo()
    assert got == [o.tokens for o in Generator(adapted)(prompts, max_new_tokens=NEW)]


def test_lengths():
    assert [padded_length(n) for n in (1, 16, 17, 512, 513, 1500)] == [16, 16, 32, 512, 1024, 1536]
    assert list(LENGTHS) == sorted(LENGTHS)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "the list is empty"),
        ([[1], []], {}, "prompt 1: is empty"),
        ([[1, tiny.VOCAB]], {}, r"prompt 0: .*outside 0\.\.63"),
        (["text"], {}, "needs a tokenizer"),
        ([[{"role": "user", "content": "x"}]], {}, "needs a tokenizer"),
        ([[1.5]], {}, "neither text"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"top_p": 2.0}, "top_p"),
        ([[1]], {"seed": [1, 2]}, "2 seeds"),
    ],
)
def test_bad_input(generator, prompts, options, message):
    with pytest.raises(InputError, match=message):
        generator(prompts, **options)


def test_only_decoders_generate():
    for model in (tiny.encoder(1), Classifier(tiny.decoder(1), HeadShape("last"), 3, rngs=nnx.Rngs(0))):
        with pytest.raises(InputError, match="generate needs a decoder; this model is a"):
            Generator(model)
    learned = tiny.decoder(1)
    learned.config = nnx.static(dataclasses.replace(learned.config, positions=8))
    with pytest.raises(InputError, match=r"context of 8; at most 5 new tokens fit"):
        Generator(learned)([[1, 2, 3]], max_new_tokens=6)


def test_more_than_the_context_is_refused_before_anything_is_made(generator):
    model = tiny.decoder(1)
    model.origin = nnx.static(SimpleNamespace(config={"max_position_embeddings": 16}))
    assert context_length(model) == 16
    for rows, new, told in (([[1] * 3], 14, "context of 16; at most 13 new"), ([[1] * 20], 1, r"20 tokens and 1 more .* context of 16\.")):
        with pytest.raises(InputError, match=told):
            check(rows, model, new)
    check([[1] * 3], model, 13)
    for rows, new in (([[1]], 10**8), ([[1] * 200_000], 8)):  # of a model that does not say
        with pytest.raises(InputError, match="exceed the model's context of 131,072"):
            generator(rows, max_new_tokens=new)
