"""What a user reads when a config is wrong: one table, from the YAML or override to the message."""

import pytest

from lora_jax.config.doors import METHODS, TASKS
from lora_jax.config.load import load_config
from lora_jax.config.messages import expected, show
from lora_jax.errors import InputError

METHOD_NAMES = ", ".join(METHODS.all())
KINDS = ", ".join(TASKS.all())
BASE = """\
name: a
model: {source: m.gguf}
task: {kind: classification, source: x.csv, text: t, label: l}
training: {steps: 10}
"""

FROM_YAML = [
    # unknown keys, at any depth
    ("adapter: {rnk: 8}", "c.yaml, line 5: no config key 'adapter.rnk'. Did you mean 'adapter.rank'?"),
    ("rank: 8", "c.yaml, line 5: no config key 'rank'. Did you mean 'adapter.rank'?"),
    ("optimiser: {learning_rate: 1}", "c.yaml, line 5: no config key 'optimiser'. Did you mean 'optimizer'?"),
    ("mesh:\n  zzz: 1", "c.yaml, line 6: no config key 'mesh.zzz'. Valid keys here: data, fsdp, tensor, sweep."),
    ("1: 2", "c.yaml, line 5: no config key '1'. Valid keys here: name, model, task, adapter, optimizer, training, mesh, tracking, sweep."),
    # wrong types
    ("adapter: {rank: eight}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got 'eight'."),
    ("adapter: {rank: 1.5}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got 1.5."),
    ("adapter: {rank: true}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got true."),
    ("adapter: {rank: '8'}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got '8'. Write it without quotes."),
    ("adapter: {rank: }", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got nothing."),
    ("adapter: {rslora: yes}", "c.yaml, line 5: adapter.rslora: must be true or false, got 'yes'."),
    ("adapter: {layers: 1.5}", "adapter.layers: must be a whole number, text, a list of whole numbers or nothing (null), got 1.5."),
    ("adapter: {modules_to_save: [1]}", "must be a list of texts, got [1]. Put text that looks like something else in quotes."),
    ("adapter: {rank_pattern: {q: 0}}", "adapter.rank_pattern: must be a mapping of names to whole numbers above 0, got {'q': 0}."),
    ("mesh: 3", "c.yaml, line 5: mesh: must be a section (keys with values, indented below it), got 3."),
    (
        "sweep: {grid: {adapter.rank: 4}}",
        "c.yaml, line 5: sweep.grid: must be a mapping of names to lists of values, got {'adapter.rank': 4}.",
    ),
    # what fuzzing came upon: no text, no name and no list where one is looked for
    ("adapter: {method: [lora]}", f"c.yaml, line 5: adapter.method: must be one of {METHOD_NAMES}, got ['lora']. Did you mean 'lora'?"),
    ("adapter: {method: {a: 1}}", f"c.yaml, line 5: adapter.method: must be one of {METHOD_NAMES}, got {{'a': 1}}."),
    ("sweep: {members: 3}", "c.yaml, line 5: sweep.members: must be a list of values, got 3."),
    ('adapter: {targets: "\\ud800"}', "c.yaml, line 5: adapter.targets: '\\ud800' is not text (UTF-8)."),
    ('"a\\udfff": 1', "c.yaml: 'a\\udfff' is not text (UTF-8)."),
    # out of range
    (f"adapter: {{rank: {10**400}}}", "c.yaml, line 5: adapter.rank: a rank is at most 65536, got a number of 31 digits or more."),
    ("adapter: {rank: 0}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got 0."),
    ("adapter: {rank: -4}", "c.yaml, line 5: adapter.rank: must be a whole number above 0, got -4."),
    ("adapter: {dropout: 1}", "c.yaml, line 5: adapter.dropout: must be a number from 0 to below 1, got 1."),
    ("optimizer: {learning_rate: .inf}", "c.yaml, line 5: optimizer.learning_rate: must be a finite number, got inf."),
    ("optimizer: {warmup_steps: -1}", "c.yaml, line 5: optimizer.warmup_steps: must be a whole number from 0 up, got -1."),
    ("optimizer: {clip_norm: 0}", "c.yaml, line 5: optimizer.clip_norm: must be a number above 0 or nothing (null), got 0."),
    # one of several words
    ("adapter: {bias: lora}", "adapter.bias: must be one of none, all, lora_only, got 'lora'. Did you mean 'lora_only'?"),
    ("optimizer: {schedule: cosin}", "must be one of linear, cosine, constant, got 'cosin'. Did you mean 'cosine'?"),
    # rules between keys
    ("mesh: {data: 0}", "c.yaml, line 5: mesh: each axis must be a positive number, and at most one may be -1."),
    ("adapter: {rank_pattern: {'(': 4}}", "adapter.rank_pattern: '(' is not a regular expression"),
    ("adapter: {targets: []}", "c.yaml, line 5: adapter.targets: must name at least one target."),
    # sweeps
    ("sweep: {grid: {}}", "c.yaml, line 5: sweep: has no key to sweep over: give a 'grid'"),
    ("sweep: {grid: {adapter.rank: []}}", "c.yaml, line 5: sweep.grid: 'adapter.rank' has no values."),
    ("sweep:\n  grid:\n    adapter.rnk: [1]", "c.yaml, line 7: sweep.grid: no config key 'adapter.rnk'. Did you mean 'adapter.rank'?"),
    ("sweep: {grid: {name: [a, b]}}", "c.yaml, line 5: sweep.grid: 'name' cannot be swept, because all members share it."),
    ("sweep: {grid: {sweep.max_pack: [1]}}", "sweep.grid: 'sweep.max_pack' cannot be swept"),
    ("sweep: {grid: {tracking.dir: [a]}}", "sweep.grid: 'tracking.dir' cannot be swept"),
    ("sweep: {grid: {mesh.data: [1]}}", "sweep.grid: 'mesh.data' cannot be swept"),
    ("sweep: {grid: {adapter: [1]}}", "sweep.grid: 'adapter' is a section; name a key in it"),
    ("sweep: {grid: {adapter.rank: [4, 8, 4]}}", "sweep.grid: 'adapter.rank' lists 4 twice; members must differ."),
    (
        "sweep: {seeds: 2, memory_limit: 8 bananas}",
        "c.yaml, line 5: sweep.memory_limit: must be bytes or a size such as 8GB or 512MiB, got '8 bananas'.",
    ),
    # more than one thing
    ("rnk: 1\nadapter:\n  rank: 0", "c.yaml: 2 problems\n  line 5: no config key 'rnk'."),
    ("rnk: 1\nadapter:\n  rank: 0", "\n  line 7: adapter.rank: must be a whole number above 0, got 0."),
]

FROM_OVERRIDE = [
    ("adapter.rank", "override 'adapter.rank': is not key=value, such as 'adapter.rank=4'."),
    ("adapter.rank=0", "override 'adapter.rank=0': adapter.rank: must be a whole number above 0, got 0."),
    ("adapter.rnk=4", "override 'adapter.rnk=4': no config key 'adapter.rnk'. Did you mean 'adapter.rank'?"),
    ("lr=1", "override 'lr=1': no config key 'lr'. Did you mean 'optimizer.learning_rate'?"),
    ("adapter.rank.x=4", "'adapter.rank' holds a value, not further keys."),
    ("adapter=3", "override 'adapter=3': adapter: must be a section"),
    ("adapter.targets=[q", "override 'adapter.targets=[q', line 1, column 3: broken YAML"),
    ("task.labels=[1, 2]", "task.labels: must be a list of texts or nothing (null), got [1, 2]. Put text"),
    (
        "task.kind=causal-lm",
        f"task.kind: must be one of {KINDS}, got 'causal-lm'. Did you mean 'causal_lm'?",
    ),
    ("training.epochs=3", "c.yaml, line 4, with override 'training.epochs=3': training: give exactly one of 'steps' and 'epochs'."),
    ("task.text=null", "override 'task.text=null': task.text: must be text, got nothing."),
    (
        "name=a/b",
        "override 'name=a/b': name: must start with a letter or digit and contain only letters, digits, '.', '_' and '-'",
    ),
]


def message(tmp_path, monkeypatch, text, overrides=()):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config("c.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(("text", "expected_message"), FROM_YAML)
def test_messages_for_the_file(tmp_path, monkeypatch, text, expected_message):
    got = message(tmp_path, monkeypatch, BASE + text + "\n")
    assert expected_message in got
    assert "pydantic" not in got and "Input should" not in got and len(got.splitlines()) <= 8


@pytest.mark.parametrize(("override", "expected_message"), FROM_OVERRIDE)
def test_messages_for_an_override(tmp_path, monkeypatch, override, expected_message):
    got = message(tmp_path, monkeypatch, BASE, [override])
    assert expected_message in got
    assert "Input should" not in got


def test_a_misspelt_section_is_one_problem_not_two(tmp_path, monkeypatch):
    got = message(tmp_path, monkeypatch, BASE.replace("model:", "modle:"))
    assert got == "c.yaml, line 2: no config key 'modle'. Did you mean 'model'?"


def test_what_is_missing_is_explained(tmp_path, monkeypatch):
    got = message(tmp_path, monkeypatch, BASE.replace("source: m.gguf", ""))
    assert got.startswith("c.yaml, line 2: model.source: missing. A Hugging Face folder, a .gguf")
    got = message(tmp_path, monkeypatch, BASE.replace("kind: classification,", ""))
    assert "line 3: task.kind: missing. " in got and "causal_lm: The next token." in got and got.endswith(f"Must be one of {KINDS}.")
    got = message(tmp_path, monkeypatch, "name: a\n")
    assert got.splitlines() == ["c.yaml: 3 problems"] + [
        f"  {s}: missing; a config needs this section." for s in ("model", "task", "training")
    ]


def test_many_problems_stay_a_few_lines(tmp_path, monkeypatch):
    got = message(tmp_path, monkeypatch, BASE + "".join(f"zzz{n}: 1\n" for n in range(30)))
    assert len(got.splitlines()) == 8 and got.endswith("... and 24 more")


def test_messages_are_cut_to_a_screen():
    message = str(InputError(f"task: no column '{'x' * 100_000}'. Columns: text, label."))
    assert len(message) < 300 and message.startswith("task: no column 'xxx") and message.endswith("xxx'. Columns: text, label.")
    assert len(str(InputError("a word, " * 10_000))) < 4100
    path = "/folder" * 100
    assert str(InputError(path)) == path


def test_long_values_are_cut():
    assert len(show("x" * 500)) <= 60
    assert show(None) == "nothing" and show(False) == "false"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 5}, "a whole number from 1 to 5"),
        ({"type": "number", "maximum": 5}, "a number at most 5"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "a number above 0 to below 1"),
        ({"const": "a"}, "'a'"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or nothing (null)"),
    ],
)
def test_expected(schema, words):
    assert expected(schema) == words
