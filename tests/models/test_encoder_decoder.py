"""Encoder-decoders: packed rows, the cache, the trunk, sites and layers of each stack. Numbers are compared in `tests/interop/`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import InputError, inject, merge, unmerge
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.sites import find_sites
from lora_jax.models.add_head import add_head
from lora_jax.models.heads import LanguageModel
from lora_jax.models.stack import cut_of
from tests import tiny, tiny_pairs

# One of them among the ordinary tests.
FAMILIES = ("t5", pytest.param("bart", marks=pytest.mark.slow), pytest.param("pegasus", marks=pytest.mark.long))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def texts(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(2, tiny.VOCAB, (2, 7)), rng.integers(2, tiny.VOCAB, (2, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_its_texts_alone(family):
    model, (sources, targets) = tiny_pairs.base(family), texts()
    alone = tiny.outputs(model, sources, targets)
    rows = {
        "tokens": np.pad(sources.reshape(1, -1), ((0, 0), (0, 2))),
        "segment_ids": np.array([[1] * 7 + [2] * 7 + [0] * 2]),
        "positions": np.array([[*range(7), *range(7), 0, 0]]),
        "decoder_tokens": np.pad(targets.reshape(1, -1), ((0, 0), (0, 3))),
        "decoder_segment_ids": np.array([[1] * 5 + [2] * 5 + [0] * 3]),
        "decoder_positions": np.array([[*range(5), *range(5), 0, 0, 0]]),
    }
    given: Any = {name: jnp.asarray(array, jnp.int32) for name, array in rows.items()}
    hidden = tiny.outputs(model, method="hidden", **given)
    packed = tiny.outputs(model, hidden[0, :10], method="head").reshape(2, 5, -1)
    np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_after_the_other_is_all_at_once(family):
    """Sources of two lengths; the keys of the source are made once."""
    model, (sources, targets) = tiny_pairs.base(family), texts()
    mask = np.ones_like(sources)
    mask[1, 4:] = 0
    whole = tiny.outputs(model, sources, targets, mask)
    graphdef, state = nnx.split(model, graph=True)

    @jax.jit
    def run(state, sources, mask, targets):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.prefill(sources, mask, 9, targets[:, 0])
        found = [hidden]
        for place in range(1, targets.shape[1]):
            hidden, cache = model.extend(cache, targets[:, place : place + 1])
            found.append(hidden[:, 0])
        return model.head(jnp.stack(found, 1))

    np.testing.assert_allclose(run(state, *map(jnp.asarray, (sources, mask, targets))), whole, atol=2e-5)


@pytest.mark.parametrize("cut", [pytest.param(0, marks=pytest.mark.long), 2])
def test_features_from_the_trunk_are_the_features(cut):
    """The trunk is the encoder's: what is below its lowest cut, or all of it where it is whole."""
    base = tiny_pairs.base("bart")
    if cut:
        base.encoder.layers.split_at(cut)
    base.decoder.layers.split_at(1)
    model = LanguageModel(base)
    assert cut_of(model) == (cut or 3)
    micro = {name: jnp.asarray(array[0]) for name, array in tiny_pairs.plan().batch(0).items()}
    trunk = tiny.outputs(model, micro, method="trunk")
    assert trunk.shape == (*micro["tokens"].shape, tiny.WIDTH)
    whole = tiny.outputs(model, micro, method="features")
    np.testing.assert_allclose(tiny.outputs(model, micro | {"trunk": trunk}, method="features"), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(tiny.outputs(model, micro | {"trunk": 1.5 * trunk}, method="features") - whole).max() > 1e-3


def test_every_linear_weight_is_a_site_and_goes_by_both_names():
    sites = {site.name: site for site in find_sites(tiny_pairs.base("bart"))}
    attention = [
        f"{half}.layers.{a}.{p}_proj" for half, a in (("encoder", "attn"), ("decoder", "attn"), ("decoder", "cross_attn")) for p in "qkvo"
    ]
    assert {
        *attention,
        *(f"{half}.layers.mlp.{p}_proj" for half in ("encoder", "decoder") for p in ("up", "down")),
        "embed",
    } <= sites.keys()
    assert sites["decoder.layers.cross_attn.o_proj"].names[1] == (
        "decoder.layers.1.cross_attn.o_proj",
        "model.decoder.layers.1.encoder_attn.out_proj",
    )
    (wi,) = (s for s in find_sites(tiny_pairs.base("t5")) if s.name == "encoder.layers.mlp.gate_proj")
    assert wi.names[2][1] == "encoder.block.2.layer.1.DenseReluDense.wi_0"


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [
        ("last:1", {2}, {1}),
        ([0, 1], {0, 1}, {0, 1}),
        ("encoder:last:2", {1, 2}, set()),
        ("encoder:0, decoder:all", {0}, {0, 1}),
        ("decoder:0-1, -1", {2}, {0, 1}),
    ],
)
def test_layers_of_each_stack(layers, encoder, decoder):
    found = resolve(tiny_pairs.model(), tiny.adapter(layers=layers)).sites
    for half, wanted in (("encoder", encoder), ("decoder", decoder)):
        own = [np.flatnonzero(site.ranks).tolist() for name, site in found.items() if f"{half}." in name]
        assert all(set(layers) == wanted for layers in own) and bool(own) == bool(wanted)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (2, "there is no layer 2; the decoder has layers 0 to 1"),
        ("encodr:1", "there is no stack 'encodr'. Did you mean 'encoder'.* Stacks: decoder, encoder"),
        ("decoder:first:3", "asks for 3 layers, but the decoder has 2"),
        ("encoder:x", "cannot read 'x'"),
    ],
)
def test_bad_layers_of_a_stack(layers, told):
    with pytest.raises(InputError, match=told):
        resolve(tiny_pairs.model(), tiny.adapter(layers=layers))


def test_a_model_of_one_stack_has_no_names_of_stacks():
    with pytest.raises(InputError, match="there is no stack 'encoder'. The model has one stack"):
        resolve(tiny.language_model(2), tiny.adapter(layers="encoder:0"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", pytest.param("mbart", marks=pytest.mark.long)])
def test_identity_at_step_0_and_merging(family):
    model, (sources, targets) = tiny_pairs.base(family), texts()
    before = tiny.outputs(model, sources, targets, bits=True)
    new = inject(model, tiny.adapter(targets="all-linear"), rngs=nnx.Rngs(0))
    assert np.array_equal(tiny.outputs(new, sources, targets, bits=True), before)
    adapted = tiny.trained(model, targets="all-linear", layers="decoder:last:1, encoder:1")
    after = tiny.outputs(adapted, sources, targets)
    assert np.abs(after - before).max() > 0.01
    merged = merge(adapted)
    np.testing.assert_allclose(tiny.outputs(merged, sources, targets), after, atol=1e-5 * np.abs(after).max())
    assert tiny.arrays_equal(tiny.base_arrays(unmerge(merged)), tiny.base_arrays(adapted))


def test_it_bears_no_head():
    with pytest.raises(InputError, match="none of kind 'classification' on an encoder-decoder"):
        add_head(tiny_pairs.base(), "classification", rngs=nnx.Rngs(0))
