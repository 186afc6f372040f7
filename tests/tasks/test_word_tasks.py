"""Classes of words and answers in texts, from files to metrics: trained in packs, scored by the task's own measure."""

from __future__ import annotations

import json
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.errors import InputError
from lora_jax.models.heads import QuestionAnswerer, TokenClassifier
from lora_jax.packing.pack import Pack
from lora_jax.training.evaluation import evaluate_pack
from lora_jax.training.loop import train_pack
from lora_jax.training.setup import set_up
from tests.tiny_hub import WIDTH

pytestmark = pytest.mark.usefixtures("compile_cache")

LISTENER = types.SimpleNamespace(on_start=lambda step: None, on_save=lambda step: None, on_train=lambda *_: None, on_eval=lambda *_: None)


def trained(config, steps):
    setup = set_up(config)
    pack = Pack.build(setup.model, [config, config], setup.steps, setup.mesh)
    before = evaluate_pack(pack, setup, pack.state.trainable)
    outcome = train_pack(pack, setup, eval_every=0, log_every=steps, listener=LISTENER)
    return setup, pack, before, outcome


LEARNING = {"adapter.targets": "all-linear", "adapter.rank": 4, "optimizer.learning_rate": 0.005, "optimizer.head_lr_ratio": 5.0}


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_words_learn_their_classes(hub, tmp_path, causal):
    config = hub.config(
        tmp_path, LEARNING | {"model.source": str(hub.llama if causal else hub.bert), "task": hub.tagging(), "training.steps": 60}
    )
    setup, _, before, outcome = trained(config, 60)
    assert (
        isinstance(setup.model, TokenClassifier) and setup.metrics.selection == "f1" and setup.data.classes == ("B-COLOR", "I-COLOR", "O")
    )
    assert set(outcome.final) == {"loss", "accuracy", "precision", "recall", "f1"}
    assert (before["f1"] < 0.3).all() and (outcome.final["f1"] > 0.9).all() and (outcome.final["accuracy"] > 0.9).all()


@pytest.mark.slow
def test_answers_are_found_in_windows(hub, tmp_path):
    config = hub.config(tmp_path, LEARNING | {"task": hub.answering(), "training.steps": 100})
    setup, pack, before, outcome = trained(config, 100)
    assert isinstance(setup.model, QuestionAnswerer) and setup.metrics.selection == "f1"
    assert len(setup.data.held_out.tokens) > 20 and setup.data.held_out.types is not None  # more windows than rows
    assert set(outcome.final) == {"loss", "exact_match", "f1"}
    assert (before["exact_match"] < 0.3).all() and (outcome.final["exact_match"] > 0.8).all()
    on_training_rows = evaluate_pack(pack, setup, outcome.final_arrays, setup.data.train)
    assert (on_training_rows["exact_match"] > 0.9).all() and on_training_rows["loss"].tolist() != outcome.final["loss"].tolist()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tagging", pytest.param("answering", marks=pytest.mark.long)])
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs the devices that tests/conftest.py makes")
def test_a_mesh_gives_the_same_metrics(hub, tmp_path, kind):
    found = []
    for mesh in ({}, {"data": 2, "fsdp": 2}):
        config = hub.config(tmp_path, {"task": getattr(hub, kind)(), "mesh": mesh, "training.batching": "padded"})
        setup = set_up(config)
        pack = Pack.build(setup.model, [config], setup.steps, setup.mesh)
        found.append(evaluate_pack(pack, setup, pack.state.trainable))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)


def with_tagger(hub, folder):
    """The tiny BERT, saved with a head for classes of words."""
    shutil.copytree(hub.bert, folder)
    weights = {f"bert.{name}": value for name, value in load_file(hub.bert / "model.safetensors").items()}
    rng = np.random.default_rng(5)
    weights |= {"classifier.weight": rng.standard_normal((3, WIDTH)), "classifier.bias": rng.standard_normal(3)}
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
    config = json.loads((hub.bert / "config.json").read_text()) | {"id2label": {"0": "O", "1": "B-COLOR", "2": "I-COLOR"}}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    return str(folder), weights


def test_a_head_that_was_saved_goes_on(hub, tmp_path):
    source, weights = with_tagger(hub, tmp_path / "tagger")
    task = hub.tagging() | {"head": "loaded"}
    setup = set_up(hub.config(tmp_path, {"model.source": source, "task": task}))
    assert setup.data.classes == ("O", "B-COLOR", "I-COLOR")  # its own order
    seeds = [hub.config(tmp_path, {"model.source": source, "task": task, "training.seed": seed}) for seed in (0, 1)]
    pack = Pack.build(setup.model, seeds, setup.steps, setup.mesh)
    for member in range(2):
        np.testing.assert_array_equal(pack.state.trainable["classifier.kernel"][member], weights["classifier.weight"].T.astype(np.float32))
    new = set_up(hub.config(tmp_path, {"model.source": source, "task": hub.tagging()}))  # the base alone, with a new head
    assert new.data.classes == ("B-COLOR", "I-COLOR", "O") and new.model.new == ("classifier",)
    with pytest.raises(InputError, match=r"task.labels: 2 classes; the model's head has 3: O, B-COLOR, I-COLOR\."):
        set_up(hub.config(tmp_path, {"model.source": source, "task": task | {"labels": ["O", "B-COLOR"]}}))
    with pytest.raises(InputError, match="holds no trained head for token_classification"):
        set_up(hub.config(tmp_path, {"task": task}))


def test_rows_that_will_not_do_are_named(hub, tmp_path):
    rows = hub.tags.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*rows[:2], rows[2].replace('"labels": ["O", ', '"labels": ['), *rows[3:]]))
    with pytest.raises(InputError, match=r"task.source: row 3 of .*bad.jsonl: \d+ words and \d+ labels"):
        set_up(hub.config(tmp_path, {"task": hub.tagging() | {"source": str(bad)}}))
    with pytest.raises(InputError, match=r"has the label '[OBI].*Classes: O, B-COLOR\."):
        set_up(hub.config(tmp_path, {"task": hub.tagging() | {"labels": ["O", "B-COLOR"]}}))
