"""`lora-jax predict`: a line for each row, for every kind of task, with what is right or without; and what is refused."""

from __future__ import annotations

import collections
import json

import pytest

from lora_jax.sweeps.restore import evaluate_run
from lora_jax.tracking import MemberResult, Progress
from tests import tiny
from tests.tasks.test_squad import official
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def trained(hub, folder, changes, *, causal=False):
    """The run directory of one member."""
    path = hub.write(folder, {"training.steps": 4, "training.eval_every": 0} | changes, causal=causal)
    done = call("train", path)
    assert done.code == 0, done.err
    return folder / "runs" / "tiny"


def predicted(run, source, output, *options):
    """The lines that `predict` writes."""
    done = call("predict", run, "--source", source, "--output", output, *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(list(line) == ["row", "input", "reference", "output", "score"] for line in lines)
    assert [line["row"] for line in lines] == list(range(1, len(lines) + 1)) and f"{len(lines):,} rows" in done.out
    return lines


def without(path, source, *columns):
    """The rows of a file of JSON lines without some columns, as another file."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: row[key] for key in row if key not in columns}) + "\n" for row in rows))
    return path


def unlabelled(lines, path, run, source, *columns):
    """Checks that the same outputs come without the columns that say what is right."""
    bare = predicted(run, without(path.with_suffix(".jsonl"), source, *columns), path.with_suffix(".out"))
    assert [(line["input"], line["output"]) for line in bare] == [(line["input"], line["output"]) for line in lines]
    assert {(line["reference"], line["score"]) for line in bare} == {(None, None)}


def reviews(hub, folder):
    """Some of the reviews as JSON lines, and their cells."""
    rows = folder / "rows.jsonl"
    cells = [line.split(",")[:2] for line in hub.reviews.read_text().splitlines()[1:41]]
    rows.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in cells))
    return rows, cells


def check_classes(run, rows, cells, folder):
    lines = predicted(run, rows, folder / "out.jsonl")
    assert [[line["input"], line["reference"]] for line in lines] == cells
    assert all(line["score"] == (line["output"] == line["reference"]) for line in lines)
    # All of these rows were held out: what was recorded is what is written.
    result = MemberResult.read(run / "main")
    assert sum(line["score"] for line in lines) / 40 == pytest.approx(result.best["accuracy"])
    pairs = collections.Counter((line["reference"], line["output"]) for line in lines)
    classes, counts = result.details["classes"], result.details["confusion"]
    assert counts == [[pairs[right, given] for given in classes] for right in classes] and classes == ["neg", "pos"]
    f1 = [2 * pairs[c, c] / max(1, sum(n for pair, n in pairs.items() for side in pair if side == c)) for c in classes]
    assert result.details["class_f1"] == pytest.approx(f1, rel=1e-6) and result.best["macro_f1"] == pytest.approx(sum(f1) / 2, rel=1e-6)
    unlabelled(lines, folder / "bare", run, rows, "label")


@pytest.fixture(scope="module")
def classified(hub, tmp_path_factory, compile_cache, quick):
    """A run of a classification, and what `reviews` gave it to hold out."""
    folder = tmp_path_factory.mktemp("classified")
    rows, cells = reviews(hub, folder)
    return trained(hub, folder, {"task.eval_source": str(rows), "task.eval_size": "all"}), rows, cells


def test_classes(classified, tmp_path):
    check_classes(*classified, tmp_path)


@pytest.mark.slow
def test_words_for_classes(hub, tmp_path):
    rows, cells = reviews(hub, tmp_path)
    words = {"model.source": str(hub.llama), "task.label_words": ["bad", "good"]}
    run = trained(hub, tmp_path, words | {"task.eval_source": str(rows), "task.eval_size": "all"})
    check_classes(run, rows, cells, tmp_path)


def test_what_is_refused(classified, tmp_path):
    run, rows = classified[0], tmp_path / "rows.csv"
    rows.write_text("text,label\na good film,pos\n,neg\n")
    first = call("predict", run, "--source", rows)
    assert first.code == 0 and f"{run}/main/predictions.jsonl: 2 rows, mean score" in first.out
    asks = {
        (run, "--source", rows): "predictions.jsonl already exists and is not overwritten",
        (run, "--source", tmp_path / "none.csv", "--output", "x"): "--source: ",
        (run, "--source", rows, "--output", "x", "--member", "man"): "--member: no member 'man'. Did you mean 'main'?",
        (run, "--source", rows, "--output", "x", "--max-new-tokens", 4): "generates no text",
        (run.parent / "tinny", "--source", rows): "no such run directory",
    }
    for arguments, told in asks.items():
        refused = call("predict", *arguments)
        assert refused.code == 2 and told in refused.err and "Traceback" not in refused.err, (arguments, refused.err)
    rows.write_text("txt,label\na good film,pos\n")
    refused = call("predict", run, "--source", rows, "--output", tmp_path / "x")
    assert refused.code == 2 and "has no column 'text'. Did you mean 'txt'" in refused.err
    rows.write_text("text,label\na good film,poss\n")
    refused = call("predict", run, "--source", rows, "--output", tmp_path / "x")
    assert refused.code == 2 and "row 1 of" in refused.err and "Did you mean 'pos'" in refused.err
    assert not (tmp_path / "x").exists()
    # An empty text is a row like any other.
    lines = [json.loads(line) for line in (run / "main" / "predictions.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == ["a good film", ""] and lines[1]["output"] in ("neg", "pos")


@pytest.mark.slow
def test_words(hub, tmp_path):
    run = trained(hub, tmp_path, {"task": hub.tagging() | {"max_length": 12}})
    lines = predicted(run, hub.tags, tmp_path / "out.jsonl")
    assert all(len(line["input"]) == len(line["output"]) == len(line["reference"]) for line in lines)
    assert any(None in line["output"] for line in lines)  # words beyond `max_length`
    for line in lines:
        right = [a == b for a, b in zip(line["output"], line["reference"], strict=True)]
        assert line["score"] == pytest.approx(sum(right) / len(right))
    unlabelled(lines, tmp_path / "bare", run, hub.tags, "labels")


@pytest.mark.slow
def test_answers_score_as_in_the_official_script(hub, tmp_path):
    learning = {"adapter.targets": "all-linear", "adapter.rank": 4, "optimizer.learning_rate": 0.005, "optimizer.head_lr_ratio": 5.0}
    task = hub.answering() | {"eval_source": str(without(tmp_path / "held.jsonl", hub.facts)), "eval_size": "all"}
    run = trained(hub, tmp_path, learning | {"task": task, "training.steps": 30})
    lines = predicted(run, hub.facts, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in hub.facts.read_text().splitlines()]
    exact, f1 = official(rows, [line["output"] for line in lines])
    assert [line["input"] for line in lines] == [{"question": row["question"], "context": row["context"]} for row in rows]
    assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(f1)
    recorded = evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False))["main"]
    assert f1 > 0.1 and (recorded["exact_match"], recorded["f1"]) == pytest.approx((exact, f1))
    unlabelled(lines, tmp_path / "bare", run, hub.facts, "answers")


WAYS = {"response": pytest.mark.slow, "text": pytest.mark.long, "messages": pytest.mark.slow}


@pytest.mark.parametrize("way", [pytest.param(way, marks=mark) for way, mark in WAYS.items()])
def test_next_tokens(hub, tmp_path, way):
    task = {"kind": "causal_lm", "source": str(hub.questions), "eval_size": 20, "max_length": 24}
    keys = {"response": {"prompt": "prompt", "response": "response"}, "text": {"text": "prompt"}, "messages": {"messages": "messages"}}
    run = trained(hub, tmp_path, {"task": task | keys[way], "training.steps": 2}, causal=True)
    lines = predicted(run, hub.questions, tmp_path / "out.jsonl", "--max-new-tokens", 4)
    assert all(isinstance(line["output"], str) and len(line["output"].split()) <= 4 for line in lines)
    rows = [json.loads(line) for line in hub.questions.read_text().splitlines()]
    if way == "text":
        assert {(line["reference"], line["score"]) for line in lines} == {(None, None)}
        return
    assert [line["reference"] for line in lines] == [row["response"] for row in rows]
    assert lines[0]["input"] == rows[0]["prompt"] if way == "response" else lines[0]["input"] == f"user: {rows[0]['prompt']}"
    assert all(0 <= line["score"] <= 1 for line in lines)
    if way == "response":
        bare = predicted(run, without(tmp_path / "b.jsonl", hub.questions, "response"), tmp_path / "b.out", "--max-new-tokens", 4)
        assert [line["output"] for line in bare] == [line["output"] for line in lines] and bare[0]["reference"] is None


@pytest.mark.slow
def test_generated_texts(hub, tmp_path):
    task = {"kind": "generation", "source": str(hub.questions), "prompt": "prompt", "response": "response"}
    task |= {"max_length": 24, "max_new_tokens": 6, "eval_size": 20, "metrics": ["token_f1"], "decoded_rows": 4}
    run = trained(hub, tmp_path, {"task": task, "training.steps": 2}, causal=True)
    lines = predicted(run, hub.questions, tmp_path / "out.jsonl", "--batch-size", 7)
    unlabelled(lines, tmp_path / "bare", run, hub.questions, "response")
    assert predicted(run, hub.questions, tmp_path / "other.jsonl", "--batch-size", 16) == lines


@pytest.mark.slow
def test_hidden_states_are_no_predictions(hub, tmp_path):
    task = {"kind": "distillation", "source": str(hub.reviews), "text": "text", "teacher": str(hub.bert), "eval_size": 20, "max_length": 24}
    run = trained(hub, tmp_path, {"task": task, "training.steps": 2})
    refused = call("predict", run, "--source", hub.reviews, "--output", tmp_path / "x")
    assert refused.code == 2 and "'distillation' predicts nothing that could be written" in refused.err
