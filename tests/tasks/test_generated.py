"""Tasks whose output is a text: which tokens a row becomes, which references it has, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from lora_jax.data.batching import NO_TARGET
from lora_jax.errors import InputError
from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.tasks.translation import LANGUAGES, language
from lora_jax.weights.tokenizer import load_tokenizer
from tests.tiny_hub import call

SHORT = {"kind": "summarisation", "text": "story", "target": "plot", "max_length": 24, "max_new_tokens": 8, "eval_size": 2}
WORD = ("bad", "good")
STORIES = [{"story": f"the film was {WORD[i % 2]} {'and it ' * i}", "plot": f"a {WORD[i % 2]} film"} for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer(hub):
    return load_tokenizer(str(hub.llama))


@pytest.fixture
def data(tmp_path, tokenizer):
    """`data(rows, test=rows, **keys)`: the data of a task."""

    def made(rows=STORIES, test=None, **keys):
        files = {"source": rows} | ({} if test is None else {"test_source": test})
        for key, some in files.items():
            (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        section = task_section(**(SHORT | {key: str(tmp_path / f"{key}.jsonl") for key in files} | keys))
        return prepare(section, tokenizer, decoder=True)

    return made


def learned(tokens, targets):
    """What is before the tokens with a loss, and these."""
    wanted = [i + 1 for i, target in enumerate(targets) if target != NO_TARGET]
    return tokens[: wanted[0]].tolist(), tokens[wanted[0] : wanted[-1] + 1].tolist()


@pytest.mark.parametrize("keys", [{}, {"template": "Answer : {text} ."}, {"chat": True}, {"chat": True, "system": "good people"}])
def test_what_is_decoded_is_what_was_learned(data, tokenizer, keys):
    held_out = data(**keys, max_length=40).held_out
    assert len(held_out.prompts) == 2 and held_out.prompts.max_new_tokens == 8
    for i, prompt in enumerate(held_out.prompts.tokens):
        before, answer = learned(held_out.tokens[i], held_out.targets[i])
        assert prompt.tolist() == before
        end = "<|end|>" if keys.get("chat") else "</s>"
        assert tokenizer.decode(answer).replace(" ", "") == held_out.prompts.references[i][0].replace(" ", "") + end
    shown = tokenizer.decode(held_out.prompts.tokens[0])
    assert ("<|user|>" in shown) == bool(keys.get("chat")) and ("good people" in shown) == ("system" in keys)
    assert ("Answer :" in shown) == ("template" in keys)


def test_texts_are_cut_and_targets_are_not(data):
    made = data(max_length=20, max_new_tokens=10)
    lengths = [len(t) for t in made.held_out.prompts.tokens]
    assert max(len(p.split()) for p in made.held_out.prompts.inputs) > 10 >= max(lengths)
    assert made.taken[0].cut and not made.taken[0].ends_cut and "cut to task.max_length" in made.lines()[0]
    assert data(max_length=10, max_new_tokens=2).taken[0].ends_cut
    with pytest.raises(InputError, match="task.max_length: 12 leaves no room for text beside the 4 tokens of the template and .*= 8"):
        data(template="a film {text} : :", max_length=12)


def test_each_reference_is_learned_and_all_score(data):
    rows = [{"story": f"the film {i} was " + "it " * i, "plots": ["a film", "good film", "the plot"][: 1 + i % 3]} for i in range(8)]
    made = data(rows, target="plots")
    # Two of the eight rows are held out; each row has as many examples as references.
    assert len(made.train.tokens) + len(made.held_out.tokens) == sum(len(row["plots"]) for row in rows)
    by_input = {row["story"]: tuple(row["plots"]) for row in rows}
    prompts = made.held_out.prompts
    assert [by_input[text] for text in prompts.inputs] == prompts.references
    two = [row | {"second": "it was"} for row in STORIES]
    assert data(two, target=["plot", "second"]).held_out.prompts.references[0][1] == "it was"


def test_a_test_file_may_name_its_references_otherwise(data):
    tests = [{"story": row["story"], "plots": [row["plot"], "the plot"]} for row in STORIES]
    made = data(test=tests, target=["plot", "plots"], decoded_rows=3)
    assert len(made.test.prompts) == 3 and all(len(right) == 2 for right in made.test.prompts.references)
    assert all(len(right) == 1 for right in made.held_out.prompts.references)
    with pytest.raises(InputError, match="task: no source has a column 'plotss', only plot, plots"):
        data(test=tests, target=["plot", "plots", "plotss"])
    with pytest.raises(InputError, match="none of the columns 'plot', 'plots'. .*Columns: story, summary"):
        data(test=[{"story": "a film", "summary": "a"}], target=["plot", "plots"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plot": ""}, "row 2 of .* has no 'plot'"),
        ({"plot": "  "}, "row 2 of .*: 'plot' has an empty reference"),
        ({"plot": []}, "row 2 of .* has no reference in 'plot'"),
        ({"plot": ["a", ""]}, "row 2 of .*: 'plot' has an empty reference"),
        ({"plot": ["a", None]}, "row 2 of .*: 'plot' has None, which is no text"),
        ({"plot": None}, "row 2 of .* has no reference in 'plot'"),
        ({"plot": {"a": "b"}}, "row 2 of .*: 'plot' has {'a': 'b'}, which is no text"),
        ({"story": " "}, "row 2 of .*: 'story' is blank"),
        ({"story": None}, "row 2 of .* has no 'story'"),
    ],
)
def test_rows_that_will_not_do_are_named(data, changes, message):
    with pytest.raises(InputError, match=message):
        data([STORIES[0], STORIES[1] | changes, *STORIES[2:]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["rougel"]}, "there is no metric of texts 'rougel'. Did you mean 'rougeL'"),
        ({"metrics": ["loss"]}, "there is no metric of texts 'loss'"),
        ({"metrics": []}, "names no metric"),
        ({"metrics": ["bleu", "bleu"]}, "names a metric twice"),
        ({"template": "Summary:"}, "'template' must contain {text}"),
        ({"system": "be good"}, "'system' needs 'chat: true'"),
        ({"max_new_tokens": 24}, r"'max_new_tokens' \(24\) must be below 'max_length' \(24\)"),
        ({"date": "today"}, "must be a day"),
        ({"top_p": 0.9}, "'top_p' needs a 'temperature' above 0"),
    ],
)
def test_sections_that_will_not_do_are_refused(data, keys, message):
    with pytest.raises(ValueError, match=message):
        data(**keys)


def test_the_command_line_names_the_key(hub, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STORIES))
    task = SHORT | {"source": str(tmp_path / "rows.jsonl")}
    asks = {
        "metrics: [rougel]": "task.metrics",
        "target: plott": "has no column 'plott'. Did you mean 'plot'",
        "text: stroy": "has no column 'stroy'. Did you mean 'story'",
        "max_new_tokens: 0": "task.max_new_tokens",
    }
    for change, told in asks.items():
        path = hub.write(tmp_path, {"task": task | yaml.safe_load(change), "training.batch_size": 4}, causal=True)
        refused = call("train", path)
        assert refused.code == 2 and told in refused.err and "Traceback" not in refused.err, refused.err
    encoder = call("train", hub.write(tmp_path, {"task": task, "training.batch_size": 4}))
    assert encoder.code == 2 and "summarisation needs a decoder" in encoder.err


def test_columns_that_will_not_do_are_refused(data):
    for target, told in (("story", "names a column twice: story, story"), (["plot", "plot"], "twice"), ([], "names no column")):
        with pytest.raises(InputError, match=told):
            data(target=target)


def test_translations_name_their_languages(data, tokenizer):
    rows = [{"en": f"the film {i}", "de": f"a film {i}"} for i in range(8)]
    keys = {"kind": "translation", "text": "en", "target": "de", "source_language": "What", "target_language": "red"}
    made = data(rows, **keys)
    assert re.match(r"What\s*: the film \S+ red\s*:$", tokenizer.decode(made.held_out.prompts.tokens[0]))
    assert (language("de_DE"), language("zh-Hans"), language("Klingon")) == ("German", "Chinese", "Klingon")
    assert all(len(code) == 2 and name[0].isupper() for code, name in LANGUAGES.items())


def test_responses_follow_prompts_as_they_are(tmp_path, tokenizer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"asked": f"What is {'it ' * i}:", "said": "red film"}) + "\n" for i in range(8)))
    section = task_section(kind="generation", source=str(rows), prompt="asked", response="said", eval_size=2)
    held_out = prepare(section, tokenizer, decoder=True).held_out
    assert held_out.prompts.inputs[0].startswith("What is") and held_out.prompts.references == [("red film",)] * 2
    assert tokenizer.decode(held_out.prompts.tokens[0]).replace(" ", "") == held_out.prompts.inputs[0].replace(" ", "")
