"""The label table: ordered, complete, and what each config makes of it."""

from __future__ import annotations

import pytest
from flax import nnx

from lora_jax.adapters.inject import inject_layout
from lora_jax.adapters.labels import TRAINABLE, label_of
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.partition import partition
from lora_jax.config.schema import AdapterConfig
from lora_jax.errors import InputError
from tests import tiny


def _labels(model, **values):
    spec = resolve(model, AdapterConfig(**({"targets": ["q_proj"], "rank": 2} | values)))
    return partition(inject_layout(model, unite(model, [spec]))).labels


def test_the_first_match_decides():
    table = ((r"a\..*", "head"), (r".*\.bias", "bias"), (r".*", "frozen"))
    assert [label_of(n, table) for n in ("a.bias", "b.bias", "b.kernel")] == ["head", "bias", "frozen"]
    assert label_of("xa.kernel", table) == "frozen"  # the whole name, not a part of it


def test_an_unmatched_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"'layers.attn.q_proj.kernel' matches no regex.*nearest: layers\\.attn"):
        label_of("layers.attn.q_proj.kernel", ((r"layers\.attn\.q_proj\.bias", "bias"), (r"zzz", "head")))


def test_lora_trains_the_factors_and_a_new_head():
    model = tiny.classifier(2)
    factors = {"base.layers.attn.q_proj.lora_a": "adapter_a", "base.layers.attn.q_proj.lora_b": "adapter_b"}
    head = {"classifier.kernel": "head", "classifier.bias": "head"}
    assert _labels(model) == factors | head
    assert _labels(model, method="head") == head
    assert _labels(tiny.encoder(2)) == {k.removeprefix("base."): v for k, v in factors.items()}


def test_bias():
    model = tiny.classifier(2)
    only = {n for n, label in _labels(model, bias="lora_only").items() if label == "bias"}
    assert only == {"base.layers.attn.q_proj.bias"}
    every = {n for n, label in _labels(model, bias="all").items() if label == "bias"}
    assert "base.layers.attn.q_proj.bias" in every and "base.layers.mlp_norm.bias" in every and "base.pooler.bias" in every
    assert all(n.endswith(".bias") for n in every) and "classifier.bias" not in every


def test_full_trains_everything_in_groups():
    model = tiny.classifier(2)
    labels = _labels(model, method="full")
    assert len(labels) == len(tiny.base_arrays(model))
    assert labels["base.embed_norm.scale"] == labels["base.layers.attn_norm.bias"] == "norm"
    assert labels["base.layers.attn.q_proj.bias"] == "bias" and labels["classifier.bias"] == "head"
    assert labels["base.embed.embedding"] == labels["base.layers.attn.q_proj.kernel"] == "full"
    assert set(labels.values()) <= set(TRAINABLE)


def test_modules_to_save():
    labels = _labels(tiny.encoder(2), modules_to_save=["pooler", "attn_norm"])
    assert {n for n, label in labels.items() if label == "saved"} == {
        "pooler.kernel",
        "pooler.bias",
        "layers.attn_norm.scale",
        "layers.attn_norm.bias",
    }
    with pytest.raises(InputError, match=r"modules_to_save: 'poler' matches no module. Nearest names: pooler"):
        _labels(tiny.encoder(2), modules_to_save=["poler"])


def test_modules_to_save_take_the_names_of_hugging_face():
    """By the end of a path, of one module or of one around several; our own names come first."""
    assert saved(["self_attn"]) == {f"base.layers.attn.{x}_proj.kernel" for x in "q"}  # all that these models have names for
    assert saved(["model.embed_tokens"]) == saved(["embed"]) == {"base.embed.embedding"}
    assert saved(["q_proj"]) == {"base.layers.attn.q_proj.kernel"}
    with pytest.raises(InputError, match=r"modules_to_save: 'embed_token' matches no module. Nearest names: embed_tokens"):
        saved(["embed_token"])


def saved(names):
    labels = _labels(tiny.language_model(2), modules_to_save=names, targets=["o_proj"])
    return {n for n, label in labels.items() if label == "saved"}


def test_a_model_without_a_head_has_none_to_train():
    with pytest.raises(InputError, match=r"adapter\.method: head"):
        _labels(tiny.language_model(2), method="head")


def test_batch_statistics_and_random_keys_never_train():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    assert set(_labels(Net(nnx.Rngs(0)), method="full")) == {"dense.kernel", "dense.bias", "norm.scale", "norm.bias"}
