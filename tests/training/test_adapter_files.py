"""Saved adapters come back bit for bit, whole or not at all, and only into what they fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.training.checkpoint import load_adapter, save_adapter

ARRAYS = {"layers.attn.q_proj.lora_a": jax.random.normal(jax.random.key(0), (3, 8, 2)), "classifier.bias": jnp.arange(2.0)}


def test_there_and_back(tmp_path):
    save_adapter(tmp_path / "a" / "best", ARRAYS)
    loaded = load_adapter(tmp_path / "a" / "best", {n: jnp.zeros_like(a) for n, a in ARRAYS.items()})
    assert loaded.keys() == ARRAYS.keys()
    assert all(np.array_equal(loaded[n], ARRAYS[n]) for n in ARRAYS)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["best"]


def test_saving_again_replaces(tmp_path):
    save_adapter(tmp_path / "best", ARRAYS)
    (tmp_path / ".best.part").mkdir()  # left by a process that was killed
    (tmp_path / ".best.part" / "junk").write_text("x")
    save_adapter(tmp_path / "best", {"b": jnp.ones(3)})
    assert np.array_equal(load_adapter(tmp_path / "best", {"b": jnp.zeros(3)})["b"], np.ones(3))
    assert not (tmp_path / "best" / "junk").exists()


def test_a_failure_while_saving_leaves_the_old_one(tmp_path, monkeypatch):
    save_adapter(tmp_path / "best", ARRAYS)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(OSError):
        save_adapter(tmp_path / "best", {"b": jnp.ones(3)})
    monkeypatch.undo()
    assert load_adapter(tmp_path / "best", ARRAYS).keys() == ARRAYS.keys()


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        (ARRAYS | {"classifier.bias": jnp.zeros(3)}, "classifier.bias"),
        (ARRAYS | {"classifier.bias": jnp.zeros(2, jnp.bfloat16)}, "classifier.bias"),
        (ARRAYS | {"more": jnp.zeros(3)}, "more"),
        ({"classifier.bias": jnp.zeros(2)}, "layers.attn.q_proj.lora_a"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, expected, told):
    save_adapter(tmp_path / "best", ARRAYS)
    with pytest.raises(InputError, match=f"does not fit this model and adapter config, in {told}"):
        load_adapter(tmp_path / "best", expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arrays": 3}', '{"arrays": {"a": 1}}', '{"arrays": {"a": [3, "float32"]}}'])
def test_damaged_facts_are_told(tmp_path, text):
    save_adapter(tmp_path / "best", ARRAYS)
    (tmp_path / "best" / "adapter.json").write_text(text)
    with pytest.raises(InputError, match="adapter.json: damaged"):
        load_adapter(tmp_path / "best", ARRAYS)


def test_damaged_or_missing_arrays_are_told(tmp_path):
    with pytest.raises(InputError, match="no saved adapter here"):
        load_adapter(tmp_path / "best", ARRAYS)
    save_adapter(tmp_path / "best", ARRAYS)
    facts = json.loads((tmp_path / "best" / "adapter.json").read_text())
    assert facts["arrays"]["classifier.bias"] == [[2], "float32"]
    for file in (tmp_path / "best" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="best: damaged"):
        load_adapter(tmp_path / "best", ARRAYS)
