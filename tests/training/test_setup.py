"""From config to setup: what is shared between configs, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax.config.load import with_values
from lora_jax.errors import InputError
from lora_jax.models.heads import LabelWordClassifier, LanguageModel, SequenceClassifier
from lora_jax.training import setup as module
from lora_jax.training.setup import Preparer, check_adapters, set_up, setup_key


@pytest.fixture
def loads(monkeypatch):
    """What was loaded, in order: `base` and `data`."""
    loaded = []
    for name, word in (("BaseFiles", "base"), ("prepare", "data")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, word=word, **k: loaded.append(word) or real(*a, **k))
    return loaded


def test_a_head_for_every_task(hub, tmp_path):
    encoder = set_up(hub.config(tmp_path))
    assert isinstance(encoder.model, SequenceClassifier) and encoder.metrics.selection == "accuracy" and encoder.steps == 6
    assert encoder.model.classifier.kernel.shape == (32, 2)
    words = set_up(
        hub.config(tmp_path, {"model.source": str(hub.llama), "task.labels": ["neg", "pos"], "task.label_words": ["bad", "good"]})
    )
    assert isinstance(words.model, LabelWordClassifier) and words.metrics.selection == "accuracy" and len(words.model.word_ids) == 2
    language = set_up(hub.config(tmp_path, causal=True))
    assert type(language.model) is LanguageModel and language.metrics.selection == "loss"


def test_what_configs_have_in_common_is_loaded_once(hub, tmp_path, loads):
    config, prepare = hub.config(tmp_path), Preparer()
    first = prepare(config)
    assert loads == ["base", "data"]
    assert (
        prepare(with_values(config, {"adapter.rank": 4, "optimizer.learning_rate": 0.5, "training.seed": 3, "training.eval_every": 1}))
        is first
    )
    larger = prepare(with_values(config, {"training.batch_size": 16}))
    assert loads == ["base", "data"] and larger is not first
    assert larger.data is first.data and larger.model.base is first.model.base
    prepare(with_values(config, {"task.max_length": 12}))
    assert loads == ["base", "data", "data"]
    bfloat = prepare(with_values(config, {"model.dtype": "bfloat16"}))
    assert loads[3:] == ["base", "data"]
    assert bfloat.model.base.embed.embedding.dtype == "bfloat16" and bfloat.model.classifier.kernel.dtype == "float32"


def test_a_failure_is_not_remembered(hub, tmp_path):
    config, prepare = hub.config(tmp_path), Preparer()
    for _ in range(2):
        with pytest.raises(InputError, match="no column"):
            prepare(with_values(config, {"task.text": "txt"}))
    assert prepare(config).steps == 6


def test_keys_that_do_not_change_the_setup(hub, tmp_path):
    config = hub.config(tmp_path)
    assert setup_key(
        with_values(config, {"training.seed": 9, "training.eval_every": 2, "adapter.rank": 9, "optimizer.b1": 0.1})
    ) == setup_key(config)
    for key, value in {"training.data_seed": 1, "training.steps": 7, "task.split_seed": 1, "model.remat": "full", "mesh.data": 2}.items():
        assert setup_key(
            config.model_copy(update={"mesh": config.mesh.model_copy(update={"data": 2})})
            if key == "mesh.data"
            else with_values(config, {key: value})
        ) != setup_key(config)


def test_the_batches_are_those_of_the_config(hub, tmp_path):
    setup = set_up(hub.config(tmp_path, {"training.accumulate": 2}))
    batch = setup.plan.batch(0)
    assert batch["tokens"].shape == (2, setup.plan.rows, setup.plan.length)
    assert batch["target_weights"].sum() == 8 and len(setup.data.train.tokens) == 100 and len(setup.data.held_out.tokens) == 20
    rows = set_up(hub.config(tmp_path, {"mesh": {"data": 2, "fsdp": 2}})).plan.rows
    assert rows % 4 == 0


def test_adapters_are_checked_without_compiling(hub, tmp_path):
    config = hub.config(tmp_path)
    setup = set_up(config)
    before = {p: np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(module.nnx.state(setup.model))}
    with jax.log_compiles(False):
        check_adapters(setup, [config, with_values(config, {"adapter.rank": 4, "adapter.targets": "mlp"})])
    for changes, told in (
        ({"adapter.targets": ["q_porj"]}, "q_proj"),
        ({"adapter.modules_to_save": ["poler"]}, "pooler"),
        ({"adapter.layers": 9}, "no layer 9"),
    ):
        with pytest.raises(InputError, match=told):
            check_adapters(setup, [with_values(config, changes)])
    after = {p: np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(module.nnx.state(setup.model))}
    assert before.keys() == after.keys() and all(np.array_equal(before[p], after[p]) for p in before)


def test_what_a_run_presumes_of_model_and_data_is_checked_first(hub, tmp_path):
    setup = Preparer(weights=False)(hub.config(tmp_path))
    base, data = setup.base, setup.data
    module.check_data(base, data)
    for message, changed in {
        "the tokenizer gives the token 5000": [np.array([2, 5000], np.int32)],
        "examples of 500 tokens, but the model has 64 positions": [np.ones(500, np.int32)],
    }.items():
        train = dataclasses.replace(data.train, tokens=changed)
        with pytest.raises(InputError, match=message):
            module.check_data(base, dataclasses.replace(data, train=train))
    pairs = dataclasses.replace(data.train, types=[np.full(len(t), 2, np.int32) for t in data.train.tokens])
    with pytest.raises(InputError, match="gives token types 0 to 2, but the model has only 2"):
        module.check_data(base, dataclasses.replace(data, train=pairs))
    with pytest.raises(InputError, match="task.labels: 2 classes; the model's head has 3"):
        module.check_data(base, data, ("a", "b", "c"))
