"""Wrong input, through the command line: exit code 2, a few lines that name the key or file and the nearest choice, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from lora_jax.config.load import dump_config
from tests.tiny_hub import Called, call


def refused(result: Called, *told: str) -> None:
    assert result.code == 2, result
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) <= 8, result.err
    for part in told:
        assert part in result.err
    assert result.out == ""


@pytest.fixture
def train(hub, tmp_path):
    """Trains the tiny BERT (or, with `causal`, the tiny Llama) with some keys changed; nothing may be left of a refused run."""

    def run(changes, *arguments, causal=False, command="train"):
        path = hub.write(tmp_path, changes, causal=causal)
        before = set(tmp_path.rglob("*"))
        result = call(command, path, *arguments)
        assert set(tmp_path.rglob("*")) == before, "a refused run left files behind"
        return result

    return run


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapter.rnk": 4}, ["tiny.yaml, line ", "adapter.rnk", "Did you mean 'adapter.rank'?"]),
        ({"adaptor": {"rank": 4}}, ["adaptor", "Did you mean 'adapter'?"]),
        ({"adapter.rank": "eight"}, ["adapter.rank: must be a whole number above 0, got 'eight'"]),
        ({"adapter.rank": 0}, ["adapter.rank", "above 0, got 0"]),
        ({"adapter.rank": -4}, ["adapter.rank", "above 0, got -4"]),
        ({"training.steps": 2.5}, ["training.steps", "whole number", "2.5"]),
        ({"training.epochs": 1.0}, ["training", "exactly one of 'steps' and 'epochs'"]),
        ({"training.accumulate": 3}, ["'accumulate' (3) must divide 'batch_size' (8)"]),
        ({"optimizer.schedule": "linaer"}, ["optimizer.schedule", "Did you mean 'linear'?"]),
        ({"task.label": None}, ["task.label: missing"]),
        ({"task.question": "text"}, ["'task.question' belongs to question_answering"]),
        ({"task.kind": "question_answering"}, ["'task.text' belongs to", "task.answers: missing"]),
        ({"task.kind": "token_classification", "task.label": None}, ["task.label: missing"]),
        ({"task": {"kind": "question_answering", "source": "a.csv", "context": "c"}}, ["task.question: missing", "task.answers: missing"]),
        ({"mesh": {"data": 0}}, ["mesh", "positive"]),
        ({"model.source": None}, ["model.source: missing"]),
    ],
)
def test_configs_that_are_wrong_in_themselves(train, changes, told):
    refused(train(changes), *told)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"adapter.rank": [2, 0]}, ["adapter.rank", "above 0, got 0"]),
        ({"adapter.rank": [-1]}, ["adapter.rank", "above 0, got -1"]),
        ({"adapter.rnk": [2, 4]}, ["sweep.grid", "adapter.rnk", "Did you mean 'adapter.rank'?"]),
        ({"adapter": [2]}, ["sweep.grid", "'adapter' is a section"]),
        ({"tracking.log_every": [1, 2]}, ["'tracking.log_every' cannot be swept"]),
        ({"adapter.rank": [2, 2]}, ["'adapter.rank' lists 2 twice"]),
        ({"adapter.rank": []}, ["'adapter.rank' has no values"]),
        ({}, ["has no key to sweep over"]),
        ({"optimizer.learning_rate": [0.1, "fast"]}, ["optimizer.learning_rate", "got 'fast'"]),
    ],
)
def test_sweeps_that_are_wrong_in_themselves(train, grid, told):
    refused(train({"sweep": {"grid": grid}}, command="sweep"), *told)


def test_files_that_are_no_config(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.write(tmp_path)
    refused(call("train", "tny.yaml"), "no config file 'tny.yaml'", "Did you mean 'tiny.yaml'?")
    (tmp_path / "broken.yaml").write_text("name: a\nmodel: {source: [\ntask: x\n")
    refused(call("train", "broken.yaml"), "broken.yaml", "line")
    refused(call("train", "tiny.yaml", "adapter.rnk=4"), "override 'adapter.rnk=4'", "adapter.rank")
    refused(call("train", "tiny.yaml", "adapter.rank"), "override 'adapter.rank'", "key=value")


def test_a_command_for_the_other_kind_of_config(train):
    refused(train({"sweep": {"grid": {"adapter.rank": [2]}}}), "has a 'sweep'", "lora-jax sweep")
    refused(train({}, command="sweep"), "has no 'sweep'", "lora-jax train")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapter.targets": ["q_porj"]}, ["adapter.targets: 'q_porj' matches no module", "q_proj", "layers.0.attn"]),
        ({"adapter.targets": "attenion"}, ["adapter.targets: 'attenion' matches no module", "attention"]),
        ({"adapter.targets": "q_proj"}, ["write [q_proj]"]),
        ({"adapter.targets": "(q_proj"}, ["adapter.targets", "'(q_proj'", "not a regular expression"]),
        ({"adapter.exclude": ["k_porj"]}, ["adapter.exclude: 'k_porj' matches no module", "k_proj"]),
        ({"adapter.exclude": "attention"}, ["adapter.exclude: excludes every module"]),
        ({"adapter.rank_pattern": {"k_proj": 3}}, ["adapter.rank_pattern: 'k_proj' matches no adapted module", "q_proj"]),
        ({"adapter.layers": 3}, ["adapter.layers: there is no layer 3", "0 to 2"]),
        ({"adapter.layers": "last:4"}, ["'last:4' asks for 4 layers, but the model has 3"]),
        ({"adapter.layers": "top"}, ["adapter.layers: cannot read 'top'"]),
        ({"adapter.modules_to_save": ["poler"]}, ["adapter.modules_to_save: 'poler'", "pooler"]),
        ({"task.labels": ["neg", "positive"]}, ["task.labels: row 1 ", "'pos'", "Did you mean 'positive'?"]),
        ({"task.text": "txt"}, ["task.text: ", "no column 'txt'", "Did you mean 'text'?"]),
        ({"task.label": "lable"}, ["task.label: ", "no column 'lable'", "Did you mean 'label'?"]),
        ({"task.drop": {"kid": ["plot"]}}, ["task.drop", "no column 'kid'", "Did you mean 'kind'?"]),
        ({"task.drop": {"kind": ["plot", "review"]}}, ["task.drop: drops every row"]),
        ({"task.source": "nowhere.csv"}, ["task.source: no file or folder 'nowhere.csv'"]),
        ({"task.eval_size": 120}, ["task.eval_size: 120 of 120 rows"]),
        ({"task.max_length": 3000, "training.batch_size": 101}, ["training.batch_size: 101", "100 training examples"]),
        ({"model.source": "nowhere"}, ["model.source: no file or folder 'nowhere'"]),
        ({"model.source": "package://nopackage/model"}, ["model.source", "no installed package 'nopackage'"]),
        ({"mesh": {"data": 3, "tensor": 4}}, ["mesh: data 3 x fsdp 1 x tensor 4 needs 12 devices"]),
        ({"mesh": {"data": -1, "tensor": 3}}, ["mesh: 3 does not divide the"]),
    ],
)
def test_configs_that_do_not_fit_the_model_or_the_data(train, changes, told):
    refused(train(changes), *told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.source": "BERT"}, ["task.kind: causal_lm needs a decoder", "is an encoder"]),
        ({"adapter": {"method": "head"}}, ["adapter.method: head"]),
        ({"task.response": "answer"}, ["task.response: ", "no column 'answer'", "response"]),
        ({"task.max_length": 1}, ["task.max_length = 1"]),
    ],
)
def test_language_model_configs_that_do_not_fit(train, hub, changes, told):
    changes = {k: str(hub.bert) if v == "BERT" else v for k, v in changes.items()}
    refused(train(changes, causal=True), *told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["good", "good"], ["task.label_words: 'good' and 'good' begin with the same token"]),
        (["good", "fine", "bad"], ["task.label_words: 3 words for 2 classes"]),
        (["good", ""], ["task.label_words: the word of class 'pos' is empty"]),
    ],
)
def test_label_words_that_cannot_tell_classes_apart(train, hub, words, told):
    refused(train({"model.source": str(hub.llama), "task.label_words": words}), *told)


def test_a_template_that_leaves_no_room(train, hub):
    changes = {"model.source": str(hub.llama), "task.max_length": 2, "task.label_words": ["good", "bad"]}
    refused(train(changes), "task.max_length: 2 leaves no room")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["data.csv is empty"]),
        ("\n\n", ["data.csv has no columns"]),
        ("text,label\n", ["has no rows"]),
        ("words,label\ngood,pos\n", ["no column 'text'", "words"]),
        ("text,label\n" + "".join(f"good {i},pos\n" for i in range(30)), ["task.label: the column 'label' has one value only"]),
        ("text,label\n" + "good,pos\nbad,neg\n" * 30, ["task.eval_size: the texts repeat"]),
    ],
)
def test_data_sets_that_hold_nothing_to_learn_from(train, tmp_path, text, told):
    (tmp_path / "data.csv").write_text(text)
    refused(train({"task.source": str(tmp_path / "data.csv")}), *told)


def test_rows_longer_than_the_positions(train, tmp_path, hub):
    rows = [f"{'a film ' * 40} {i} {'good' if i % 2 else 'bad'},{'pos' if i % 2 else 'neg'}" for i in range(60)]
    (tmp_path / "long.csv").write_text("\n".join(["text,label", *rows]))
    refused(
        train({"task.source": str(tmp_path / "long.csv"), "task.max_length": 80}), "task.max_length: examples of 80 tokens", "64 positions"
    )
    # A long text that is held out alone is as bad.
    changes = {"task.eval_source": str(tmp_path / "long.csv"), "task.max_length": 80}
    refused(train(changes), "task.max_length: examples of 80 tokens", "64 positions")


def test_a_label_of_the_held_out_file_that_is_no_class(train, tmp_path):
    (tmp_path / "eval.csv").write_text("text,label\ngood film,pos\nfine film,neutral\n")
    refused(train({"task.eval_source": str(tmp_path / "eval.csv")}), "task.labels: row 2 of", "eval.csv", "'neutral'", "neg, pos")


@pytest.mark.parametrize("kept", [4, 100, 0.5, -1])
def test_a_truncated_safetensors_file(train, hub, tmp_path, kept):
    folder = shutil.copytree(hub.bert, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    refused(train({"model.source": str(folder)}), "model.safetensors", "damaged")


@pytest.mark.parametrize("kept", [2, 16, 60, 0.5, -8])
def test_a_truncated_gguf_file(train, tmp_path, kept):
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "context_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    refused(train({"model.source": str(tmp_path / "model.gguf")}, causal=True), "model.gguf")


def test_a_model_that_is_not_known(train, hub, tmp_path):
    folder = shutil.copytree(hub.bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "brt"}))
    refused(train({"model.source": str(folder)}), "model_type 'brt' is not supported", "Did you mean 'bert'")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(train({"model.source": str(folder)}), "has shape", "the config asks for")
    (folder / "config.json").write_text("{")
    refused(train({"model.source": str(folder)}), "config.json")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    refused(train({"model.source": str(folder)}), "tokenizer.json")


def test_a_wrong_member_is_found_before_any_member_trains(train):
    # Different batch sizes are different programs: the wrong one would come second.
    grid = {"training.batch_size": [8, 101]}
    refused(train({"sweep": {"grid": grid}}, command="sweep"), "training.batch_size: 101")
    grid = {"adapter.bias": ["none", "all"], "adapter.layers": [1, 7]}
    refused(train({"sweep": {"grid": grid}}, command="sweep"), "there is no layer 7")


def test_a_name_that_is_taken(hub, tmp_path):
    path = hub.write(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("mine")
    refused(call("train", path), "exists and is not a run directory")
    refused(call("train", path, "--fresh"), "exists and is not a run directory")
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]
    (run / "thesis.txt").unlink()
    (run / "config.yaml").write_text(dump_config(hub.config(tmp_path, {"adapter.rank": 64})))
    path = hub.write(tmp_path)
    refused(call("train", path), "holds a run with another config", "adapter.rank: 64 -> 2", "--fresh")
    assert [p.name for p in run.iterdir() if p.name != ".lock"] == ["config.yaml"]


def test_another_config_is_refused_before_the_model_is_loaded(hub, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(hub.config(tmp_path)))
    refused(call("train", hub.write(tmp_path, {"model.source": "nowhere"})), "holds a run with another config", "model.source")


def test_rows_of_words_and_questions(hub, train, tmp_path):
    def with_row(task, row):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
        return {"task": task | {"source": str(tmp_path / "bad.jsonl")}}

    words = with_row(hub.tagging(), {"words": ["a", "film"], "labels": ["O"]})
    refused(train(words), "task.source: row 1 of", "bad.jsonl: 2 words and 1 labels")
    row = {"context": "a film", "question": "What is it", "answers": {"text": ["film"], "answer_start": [3]}}
    refused(train(with_row(hub.answering(), row)), "row 1 of", "the answer 'film' is not at character 3")
    refused(train({"task": hub.answering() | {"stride": 20}}), "task.max_length: the question of row ", "has 3 tokens", "task.stride = 20")
    refused(train({"task": hub.tagging() | {"head": "loaded"}}), "holds no trained head for token_classification")


def test_evaluate_and_compare_on_what_is_no_run(hub, tmp_path):
    refused(call("evaluate", tmp_path), "not a run directory")
    for command in ("evaluate", "compare", "export"):
        refused(call(command, tmp_path / "nowhere"), f"error: {tmp_path / 'nowhere'}: no such run directory.\n")
    refused(call("compare", tmp_path), "not a run directory")
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    hub.write(tmp_path, {"sweep": {"grid": {"adapter.rank": [2, 4]}}}).rename(run / "config.yaml")
    for command in ("evaluate", "compare", "export"):
        refused(call(command, run.with_name("tiyn")), f"no such run directory. Did you mean '{run}'?")
    refused(call("compare", run), "no member has results yet")
    refused(call("evaluate", run, "--split", "evl"), "--split: unknown split 'evl'", "Did you mean 'eval'?")
    refused(call("evaluate", run, "--member", "rank=3"), "--member: no member 'rank=3'", "rank=2", "rank=4")
    refused(call("evaluate", run), "member 'rank=2' has no saved adapter")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "tiny.yaml", "adapter.rnk=4"], "Did you mean 'adapter.rank'?"),
        pytest.param(["train", "tiny.yaml", "adapter.targets=[q_porj]"], "'q_porj' matches no module", marks=pytest.mark.slow),
        (["train", "tiny.yaml", "task.text=txt"], "no column 'txt'"),
    ],
)
def test_in_a_process_of_its_own(hub, tmp_path, arguments, told):
    hub.write(tmp_path)
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-m", "lora_jax.cli.main", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    refused(Called(done.returncode, done.stdout, done.stderr), told)
    assert not (tmp_path / "runs").exists()
