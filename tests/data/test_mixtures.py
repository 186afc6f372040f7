"""Several sources with their shares, columns by other names, and splits of hub data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lora_jax.data.sources import load_rows
from lora_jax.data.split import mixed_rows
from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.weights.tokenizer import load_tokenizer
from tests.tiny_hub import WORDS, call


@pytest.fixture
def files(tmp_path):
    """Two files of other columns: 30 rows with `text`, and 20 rows with `review`."""
    for name, column, count in (("a", "text", 30), ("b", "review", 20)):
        rows = [{column: f"{name} {WORDS[i % 20]} {WORDS[(i * 7 + 3) % 20]} {'it ' * (i % 5)}", "other": i} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def data_of(hub, **keys):
    return prepare(task_section(kind="causal_lm", text="text", eval_size=5, **keys), load_tokenizer(str(hub.llama)), decoder=True)


def test_each_source_has_its_share(hub, files):
    sources = [
        {"source": str(files / "a.jsonl"), "weight": 1.0},
        {"source": str(files / "b.jsonl"), "weight": 3.0, "columns": {"review": "text"}},
    ]
    data, again = data_of(hub, sources=sources), data_of(hub, sources=sources)
    assert len(data.train.tokens) == 45 and len(data.held_out.tokens) == 5
    assert [a.tolist() for a in data.train.tokens] == [a.tolist() for a in again.train.tokens]
    assert any("11 rows of" in line and "a.jsonl" in line for line in data.lines()), data.lines()
    assert any("34 rows of" in line and "b.jsonl" in line for line in data.lines())
    plain = data_of(hub, sources=[{k: v for k, v in one.items() if k != "weight"} for one in sources])
    assert len({tuple(a.tolist()) for a in plain.train.tokens}) > len({tuple(a.tolist()) for a in data.train.tokens})
    assert [a.tolist() for a in plain.held_out.tokens] == [a.tolist() for a in data.held_out.tokens]


def test_shares_are_whole_passes_and_a_part_of_one_more():
    origin, at = np.array([0] * 6 + [1] * 4), np.random.default_rng(0).permutation(10)
    for size in (None, 7, 40):
        found = mixed_rows(at, origin, [1.0, 2.0], size=size, seed=3)
        counts = np.bincount(found, minlength=10)
        assert len(found) == (size or 10) and abs(counts[6:].sum() - 2 / 3 * len(found)) <= 1
        for own in (counts[:6], counts[6:]):
            assert own.max() - own.min() <= 1
    assert np.array_equal(mixed_rows(at, origin, [1, 1], size=8, seed=3), mixed_rows(at, origin, [1, 1], size=8, seed=3))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"sources": [{"source": "a.jsonl", "weight": 0}]}, ["the weight of", "a.jsonl is 0; it must be above 0"]),
        ({"sources": [{"source": "a.jsonl"}, {"source": "a.jsonl"}]}, ["names", "a.jsonl twice"]),
        ({"sources": [{"source": "a.jsonl", "weight": 1}, {"source": "b.jsonl"}]}, ["all have a weight, or none"]),
        ({"sources": [{"source": "a.jsonl", "weigth": 1}]}, ["'sources': there is no key 'weigth'", "'weight'"]),
        ({"sources": [{"source": "a.jsonl"}, {"source": "c.jsonl"}]}, ["no file or folder", "c.jsonl"]),
        ({"sources": [{"source": "a.jsonl"}, {"source": "b.jsonl"}]}, ["no column 'text'"]),
        ({"sources": [{"source": "a.jsonl"}], "source": "b.jsonl"}, ["'source' and 'sources' do not go together"]),
        ({"source": "b.jsonl", "columns": {"reviews": "text"}}, ["task.columns", "no column 'reviews'", "'review'"]),
        ({"source": "a.jsonl", "columns": {"other": "text"}}, ["task.columns", "has a column 'text' beside 'other'"]),
        ({"source": "hf://org"}, ["hf://org/name[@revision][:config[/split]]"]),
    ],
)
def test_wrong_input_is_told(hub, files, keys, told):
    task = {"kind": "causal_lm", "text": "text", "eval_size": 5} | keys
    (files / "runs").mkdir()
    result = call("train", hub.write(files, {"task": task}, causal=True))
    assert result.code == 2 and "Traceback" not in result.err, result
    for part in told:
        assert part in result.err, result.err


def test_columns_by_other_names(hub, files):
    data = data_of(hub, source=str(files / "b.jsonl"), columns={"review": "text"})
    assert len(data.train.tokens) == 15


@pytest.mark.parametrize(
    ("source", "asked", "split"),
    [
        ("hf://org/name:main/test", ("org/name", "main"), "test"),
        ("hf://org/name@v1:main", ("org/name", "main"), "train"),
        ("hf://org/name", ("org/name",), "train"),
    ],
)
def test_a_hub_source_names_its_config_and_split(monkeypatch, source, asked, split):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, revision: seen.append((*names, revision)) or parts)
    table = load_rows(source, key="task.source", columns=["text"])
    assert table["text"] == [split] and table.files[0].endswith(split) and seen == [(*asked, "v1" if "@" in source else None)]
    assert not table.note
