"""Which sites a config names, in every form a target may take."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import find_sites, logical_name, named_variables, parameter_name, passed_over
from lora_jax.adapters.targets import select
from lora_jax.config.patterns import parse_layers
from lora_jax.errors import InputError
from tests import tiny

ATTENTION = {f"layers.attn.{p}_proj" for p in "qkvo"}
MLP = {"layers.mlp.up_proj", "layers.mlp.down_proj"}


@pytest.fixture(scope="module")
def bert():
    return find_sites(tiny.encoder(4))


@pytest.fixture(scope="module")
def llama():
    return find_sites(tiny.decoder(4, tied=False))


def names(sites, targets, exclude=None, layers=None):
    return set(select(sites, targets, exclude, layers))


def test_every_linear_and_embedding_weight_is_a_site(bert, llama):
    assert {s.name for s in bert} == ATTENTION | MLP | {"embed", "position_embed", "type_embed", "pooler"}
    assert {s.name for s in llama} == ATTENTION | MLP | {"layers.mlp.gate_proj", "embed", "lm_head"}
    q = next(s for s in llama if s.name == "layers.attn.k_proj")
    assert (q.kind, q.depth, q.inputs, q.outputs, q.biased) == ("linear", 4, 32, 16, False)
    assert next(s for s in bert if s.name == "layers.attn.k_proj").biased
    embed = next(s for s in llama if s.name == "embed")
    assert (embed.kind, embed.depth, embed.inputs, embed.outputs) == ("embedding", None, 64, 32)


def test_presets(bert, llama):
    assert names(bert, "attention") == ATTENTION
    assert names(bert, "mlp") == MLP
    assert names(llama, "mlp") == MLP | {"layers.mlp.gate_proj"}
    assert names(bert, "all-linear") == ATTENTION | MLP | {"pooler"}
    assert names(llama, "all-linear") == ATTENTION | MLP | {"layers.mlp.gate_proj"}  # no lm_head
    assert names(bert, "embedding") == names(llama, "embedding") == {"embed"}


def test_classifier_is_left_out_of_all_linear():
    assert not any("classifier" in n for n in names(find_sites(tiny.classifier(2)), "all-linear"))
    assert names(find_sites(tiny.classifier(2)), ["classifier"]) == {"classifier"}


def test_a_list_names_ends_of_paths_cut_at_a_dot(bert):
    assert names(bert, ["q_proj", "mlp.up_proj"]) == {"layers.attn.q_proj", "layers.mlp.up_proj"}
    assert select(bert, ["2.attn.q_proj"], None, None)["layers.attn.q_proj"].tolist() == [False, False, True, False]
    with pytest.raises(InputError, match="matches no module"):
        names(bert, ["_proj"])  # an end, but not cut at a dot


def test_a_string_is_a_regex_for_the_whole_path(bert):
    assert names(bert, r".*\.(q|v)_proj") == {"layers.attn.q_proj", "layers.attn.v_proj"}
    chosen = select(bert, r"layers\.[13]\.attn\.q_proj", None, None)
    assert chosen["layers.attn.q_proj"].tolist() == [False, True, False, True]
    with pytest.raises(InputError, match=r"write \[q_proj\]"):
        names(bert, "q_proj")
    with pytest.raises(InputError, match="matches no module"):
        names(bert, r"attn\.q_proj")
    with pytest.raises(InputError, match="regular expression"):
        names(bert, "q_(proj")


def test_hugging_face_names_work_too(bert, llama):
    assert names(bert, ["query", "value"]) == {"layers.attn.q_proj", "layers.attn.v_proj"}
    assert names(bert, ["output.dense"]) == {"layers.attn.o_proj", "layers.mlp.down_proj"}
    chosen = select(bert, r"encoder\.layer\.(0|3)\.attention\.self\.query", None, None)
    assert chosen["layers.attn.q_proj"].tolist() == [True, False, False, True]
    assert select(llama, ["model.layers.1.self_attn.q_proj"], None, None)["layers.attn.q_proj"].tolist() == [False, True, False, False]
    assert names(llama, ["embed_tokens"]) == {"embed"}
    under_a_head = find_sites(tiny.classifier(2))
    assert names(under_a_head, ["query"]) == {"base.layers.attn.q_proj"}


def test_exclude(bert):
    assert names(bert, "attention", ["k_proj", "o_proj"]) == {"layers.attn.q_proj", "layers.attn.v_proj"}
    assert names(bert, "all-linear", "mlp") == ATTENTION | {"pooler"}
    half = select(bert, ["q_proj"], r"layers\.[01]\..*", None)
    assert half["layers.attn.q_proj"].tolist() == [False, False, True, True]
    with pytest.raises(InputError, match=r"adapter\.exclude: excludes every module"):
        names(bert, ["q_proj"], ["q_proj"])
    with pytest.raises(InputError, match=r"adapter\.exclude: 'k_prj'.*k_proj"):
        names(bert, "attention", ["k_prj"])


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (3, {3}),
        (-1, {5}),
        ([0, 5], {0, 5}),
        ([-6, 2], {0, 2}),
        ("2-4", {2, 3, 4}),
        ("first:2", {0, 1}),
        ("last:2", {4, 5}),
        ("last:6", set(range(6))),
        ("0, 2-3,last:1", {0, 2, 3, 5}),
        ("-1", {5}),
    ],
)
def test_layers(layers, wanted):
    assert parse_layers(layers, 6) == wanted


@pytest.mark.parametrize(
    "layers",
    [6, -7, [0, 6], "2-6", "4-2", "last:0", "last:7", "first:9", "top", "1,,2", "", "2-", "last:", "0-999999999999", "last:" + "9" * 5000],
)
def test_bad_layers(layers):
    with pytest.raises(InputError, match=r"adapter\.layers"):
        parse_layers(layers, 6)


def test_layers_cut_the_chosen_sites(bert):
    chosen = select(bert, ["q_proj", "pooler"], None, "last:2")
    assert {k: v.tolist() for k, v in chosen.items()} == {"layers.attn.q_proj": [False, False, True, True]}  # the pooler is in no layer
    with pytest.raises(InputError, match="none of the modules that adapter.targets matches is in a numbered layer"):
        names(bert, ["pooler"], None, 0)
    with pytest.raises(InputError, match=r"leaves no module"):
        names(bert, r"layers\.0\..*", None, 1)


def test_layers_count_from_the_top_of_the_model_not_of_the_targets():
    net = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(4)))
    with pytest.raises(InputError, match="leaves no module"):
        names(find_sites(net), r"layers\.[01]", None, "last:1")
    assert names(find_sites(net), "all-linear", None, "last:1") == {"layers.3"}


def test_errors_name_the_nearest(bert):
    with pytest.raises(InputError, match=r"'q_prj' matches no module. Nearest names: .*q_proj"):
        names(bert, ["q_prj"])
    with pytest.raises(InputError, match=r"Nearest names: q_proj.*Full paths look like .*layers\.0\."):
        names(bert, r"layers\.0\.attn\.qproj")
    with pytest.raises(InputError, match="quary.*query"):
        names(bert, ["quary"])
    with pytest.raises(InputError, match="'fc9'"):  # one good entry does not excuse another
        names(bert, ["q_proj", "fc9"])


def test_user_models():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])
            self.embed = nnx.Embed(9, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)

    sites = find_sites(Net(nnx.Rngs(0)))
    assert [s.name for s in sites if s.kind == "linear"] == [f"blocks.{i}" for i in range(12)]  # 2 comes before 10
    assert names(sites, "all-linear", None, "last:3") == {"blocks.9", "blocks.10", "blocks.11"}


def test_logical_names():
    path = ("base", "layers", "segments", 1, "block", "attn", "q_proj", "base", "bias")
    assert parameter_name(path, {path[:-2]}) == "base.layers.attn.q_proj.bias"
    assert logical_name(path[:-2], 7) == "base.layers.7.attn.q_proj"
    assert logical_name(("base", "embed", "embedding")) == "base.embed.embedding"


def test_a_users_own_module_may_be_called_base():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.base, self.inner = nnx.Linear(4, 4, rngs=rngs), nnx.List([Inner(rngs)])

    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.kernel, self.base = nnx.Param(np.ones(3)), nnx.Linear(4, 4, use_bias=False, rngs=rngs)

    plain = {"base.kernel", "base.bias", "inner.0.kernel", "inner.0.base.kernel"}
    assert {name for name, _ in named_variables(Net(nnx.Rngs(0)))} == plain
    part = partition(tiny.trained(Net(nnx.Rngs(0)), targets=["base"]))
    assert set(part.frozen) == plain and {n.rpartition(".")[0] for n in part.trainable} == {"base", "inner.0.base"}


def test_site_order_is_stable(bert):
    assert [s.name for s in bert] == [s.name for s in find_sites(tiny.encoder(4, seed=3))]
    assert all(isinstance(v, np.ndarray) for v in select(bert, "attention", None, None).values())


class Mine(nnx.Linear):
    """Computes something else of its weight."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nnx.Linear):
    """A subclass that computes what nnx.Linear does."""


class OwnModel(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.mha = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.ein, self.batched = nnx.Einsum("ab,bc->ac", (8, 8), rngs=rngs), nnx.Einsum("ab,bc->abc", (8, 8), rngs=rngs)
        self.mine, self.renamed = Mine(8, 8, rngs=rngs), Renamed(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)


def test_own_models_are_adapted_or_what_is_passed_over_is_named():
    model = OwnModel(nnx.Rngs(0))
    sites, passed = find_sites(model), passed_over(model)
    linear = {"mha.query", "mha.key", "mha.value", "mha.out", "ein", "renamed", "out"}
    assert {s.name for s in sites} == linear | {"conv"}
    assert set(passed) == {"depthwise", "batched", "mine"}
    query = next(s for s in sites if s.name == "mha.query")
    assert (query.inputs, query.outputs) == (8, 8)
    with pytest.warns(UserWarning, match=r"passes over 3 \(batched: nnx.Einsum.*depthwise: a grouped.*mine: a subclass of nnx.Linear"):
        select(sites, "all-linear", None, None, passed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passed_by_name = ["depthwise", "batched", "mine"]
        assert set(select(sites, "all-linear", passed_by_name, None, passed)) == linear
        assert set(select(sites, "convolutions", passed_by_name, None, passed)) == {"conv"}
        assert set(select(sites, "attention", None, None, passed)) == {"mha.query", "mha.key", "mha.value", "mha.out"}
    for targets in (["depthwise"], "mi.e", ["out", "mine"]):
        with pytest.raises(InputError, match=r"adapter\.targets: .* cannot be adapted"):
            select(sites, targets, None, None, passed)


@pytest.mark.parametrize("model", [tiny.encoder(2), tiny.decoder(2), tiny.encoder_of("deberta-v2")])
def test_nothing_of_our_own_bases_is_passed_over(model):
    assert passed_over(model) == {}


def test_hints_for_presets_and_empty_models():
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"'attention' matches no module. It is a preset: .*called 0. Full paths look like layers.0"):
        names(find_sites(net), "attention")
    empty = nnx.Dict(norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="no weight that can be adapted: no linear"):
        names(find_sites(empty), "all-linear")
    whole = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"can be adapted \(the model: it is the whole model: .*nnx.Sequential"):
        select(find_sites(whole), "all-linear", None, None, passed_over(whole))
