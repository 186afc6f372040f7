"""Configs are read, overridden, copied with other values, written and compared."""

import warnings

import pytest
from pydantic import ValidationError

from lora_jax.config.load import apply_overrides, dump_config, load_config, with_values
from lora_jax.config.schema import Config
from lora_jax.errors import InputError, InputWarning

TEXT = """\
name: a
model: {source: m.gguf}
task: {kind: classification, source: x.csv, text: t, label: l, labels: [no, yes]}
training: {steps: 10}
optimizer: {learning_rate: 1e-3}
sweep:
  grid:
    adapter.dropout: [0.1, 0.2]
    optimizer.b1: [0.8, 0.9]
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(TEXT)
    return file


def test_values_and_defaults(path):
    config = load_config(path)
    assert config.optimizer.learning_rate == 1e-3
    assert config.task.labels == ["no", "yes"]  # pyright: ignore[reportAttributeAccessIssue]
    assert config.adapter.rank == 8
    assert config.sweep is not None and config.sweep.grid == {"adapter.dropout": [0.1, 0.2], "optimizer.b1": [0.8, 0.9]}


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("adapter.rank=4", lambda c: c.adapter.rank, 4),
        (" adapter.rank = 4", lambda c: c.adapter.rank, 4),
        ("optimizer.learning_rate=3e-4", lambda c: c.optimizer.learning_rate, 3e-4),
        ("adapter.targets=[query, value]", lambda c: c.adapter.targets, ["query", "value"]),
        ("adapter.targets=.*(query|value)", lambda c: c.adapter.targets, ".*(query|value)"),
        ("adapter.layers=last:4", lambda c: c.adapter.layers, "last:4"),
        ("adapter.rank_pattern.layers.0.query=2", lambda c: c.adapter.rank_pattern, {"layers.0.query": 2}),
        ("adapter={rank: 2, alpha: 4}", lambda c: (c.adapter.rank, c.adapter.alpha), (2, 4.0)),
        ("task.template=Review: {text} It was", lambda c: c.task.template, "Review: {text} It was"),
        ("task.template={text} is", lambda c: c.task.template, "{text} is"),
        ('task.template="{text}\\n"', lambda c: c.task.template, "{text}\n"),
        ("task.text=1", lambda c: c.task.text, "1"),
        ("task.eval_source=null", lambda c: c.task.eval_source, None),
        ("name=2024-01-02", lambda c: c.name, "2024-01-02"),
        ("optimizer.clip_norm=null", lambda c: c.optimizer.clip_norm, None),
        ("sweep=null", lambda c: c.sweep, None),
        ("sweep.grid.training.seed=[0, 1]", lambda c: c.sweep.grid["training.seed"], [0, 1]),
        ("task.template=a=b {text}", lambda c: c.task.template, "a=b {text}"),
    ],
)
def test_overrides(path, override, get, value):
    assert get(load_config(path, [override])) == value


def test_later_overrides_win_and_the_input_is_left_alone(path):
    assert load_config(path, ["adapter.rank=4", "adapter.rank=2"]).adapter.rank == 2
    data = {"adapter": {"rank": 8}}
    assert apply_overrides(data, ["adapter.rank=4", "training.steps=3"]) == {"adapter": {"rank": 4}, "training": {"steps": 3}}
    assert data == {"adapter": {"rank": 8}}


def test_environment_is_not_read(path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    assert load_config(path, ["model.source=${oc.env:SECRET}"]).model.source == "${oc.env:SECRET}"


def test_dump_reads_back_the_same_config(path, tmp_path):
    config = load_config(path, ["task.template={text}\nAnswer: no", "optimizer.eps=1e-12", "adapter.exclude=['1', on]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert load_config(again, ["adapter.rank=3"]) != config


def test_with_values_checks_and_copies(path):
    config = load_config(path)
    member = with_values(config, {"adapter.rank": 4, "adapter.targets": ["query"], "adapter.rank_pattern.query": 2})
    assert (member.adapter.rank, member.adapter.targets, member.adapter.rank_pattern) == (4, ["query"], {"query": 2})
    assert config.adapter.rank == 8 and config.adapter.rank_pattern == {}
    assert with_values(config, {}) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter.rnk": 4}, "sweep.grid: no config key 'adapter.rnk'. Did you mean 'adapter.rank'?"),
        ({"adapter.rank": 0}, "sweep.grid: adapter.rank: must be a whole number above 0, got 0."),
        ({"adapter": {}}, "sweep.grid: 'adapter' is a section"),
        ({"training.epochs": 1.0}, "sweep.grid: training: give exactly one of 'steps' and 'epochs'."),
    ],
)
def test_with_values_refuses(path, values, message):
    with pytest.raises(InputError) as caught:
        with_values(load_config(path), values)
    assert str(caught.value).startswith(message)


def test_with_values_names_where_they_come_from(path):
    with pytest.raises(InputError, match=r"^member 'r0': adapter.rank: must be"):
        with_values(load_config(path), {"adapter.rank": 0}, where="member 'r0'")


def test_files_that_are_not_there_or_not_a_config(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(TEXT)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    for name, told in {
        "b.yaml": "no config file 'b.yaml'. Did you mean 'a.yaml'",
        "zzzzzzzzzzzzzz": "no config file 'zzzzzzzzzzzzzz'. '.' holds: a.yaml,",
        "nowhere/a.yaml": "no config file 'nowhere/a.yaml'. There is no folder 'nowhere' either.",
        "run": "run: is a folder, not a YAML file. Did you mean 'run/config.yaml'?",
        "empty.yaml": "empty.yaml: is empty; a config has at least the sections model, task, training.",
        "list.yaml": "list.yaml: must be a mapping (name:, model:, task:, ...), got a list.",
        "image.yaml": "image.yaml: is not text (UTF-8)",
    }.items():
        with pytest.raises(InputError) as caught:
            load_config(name)
        assert told in str(caught.value)


def test_a_config_of_an_older_version_says_the_keys_of_every_kind():
    """Older run directories hold all kinds' keys at their defaults; what is no default still belongs to its kind."""
    old = {"teacher": None, "prompt": None, "stride": 32, "pooling": "cls", "max_answer": 30, "label_words": None}
    values = {
        "name": "a",
        "model": {"source": "m.gguf"},
        "task": {"kind": "causal_lm", "source": "x.csv", "text": "t", "head": "new", "template": "{text}\nAnswer:"} | old,
        "adapter": {"method": "full", "rslora": False},
        "training": {"steps": 1},
    }
    config = Config.model_validate(values)
    assert not hasattr(config.task, "stride") and not hasattr(config.adapter, "rslora")
    values["task"]["stride"] = 16
    with pytest.raises(ValidationError, match="stride"):
        Config.model_validate(values)


OTHERS = """\
name: a
model: {source: m.gguf}
task:
  kind: causal_lm
  source: x.csv
  text: t
  label: label
training: {steps: 10}
"""


def test_a_key_of_another_kind_that_holds_its_default_is_said(tmp_path):
    """It would be refused with another value; what a run directory of an older version holds is passed over."""
    file = tmp_path / "c.yaml"
    file.write_text(OTHERS)
    with pytest.warns(InputWarning) as said:
        load_config(file, ["optimizer.momentum=0.9"])
    (text,) = {str(w.message) for w in said}
    assert text.startswith(f"{file}: 2 problems\n  line 7: task.label has no effect: it is a key of task.kind ")
    assert "image_classification" in text and "and this one is causal_lm." in text
    assert "override 'optimizer.momentum=0.9': optimizer.momentum has no effect" in text and text.endswith("and this one is adamw.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(file, of_run=True)


SWEPT = """\
name: a
model: {source: m.gguf}
task: {kind: classification, source: x.csv, text: t, label: l}
training: {steps: 10}
sweep: {%s}
"""


@pytest.mark.parametrize(
    ("sweep", "override", "place"),
    [
        ("grid: {adapter.rank: [2, 4]}", "adapter.rank=8", "sweep.grid"),
        ("grid: {adapter.rank: [2, 4]}", "adapter={rank: 8}", "sweep.grid"),
        ("zip: {adapter.rank: [2, 4]}", "adapter.rank=8", "sweep.zip"),
        ("random: {count: 2, keys: {adapter.rank: {choice: [2, 4]}}}", "adapter.rank=8", "sweep.random.keys"),
        ("members: [{adapter.rank: 2}, {adapter.rank: 4}]", "adapter.rank=8", "sweep.members"),
        ("seeds: [3, 4]", "training.seed=8", "sweep.seeds"),
        ("seeds: 2", "training.seed=8", None),  # the first of them
        ("grid: {adapter.rank: [2, 4]}", "adapter.alpha=8.0", None),
        ("members: [{adapter.rank: 2}, {adapter.alpha: 4.0}]", "adapter.rank=8", None),  # the second member has it
    ],
)
def test_an_override_of_a_swept_key_is_refused(tmp_path, sweep, override, place):
    file = tmp_path / "a.yaml"
    file.write_text(SWEPT % sweep)
    if place is None:
        load_config(file, [override])
        return
    with pytest.raises(InputError) as refused:
        load_config(file, [override])
    key = "training.seed" if "seed" in override else "adapter.rank"
    assert f"'{key}' is set, and {place} gives each member its own" in str(refused.value)
    assert load_config(file, [override, "sweep=null"]).sweep is None
