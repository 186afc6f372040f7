"""Saved adapters come back bit for bit, whole or not at all, and only into what they fit."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_jax.errors import InputError
from lora_jax.training.adapter_files import load_adapter, save_adapter, saved_classes
from lora_jax.weights.provenance import fingerprint
from tests.tiny_hub import call

ARRAYS = {"layers.attn.q_proj.lora_a": jax.random.normal(jax.random.key(0), (3, 8, 2)), "classifier.bias": jnp.arange(2.0)}
IDENTITY = {"base": "0123456789abcdef", "method": "lora", "sites": {"layers.attn.q_proj": {"ranks": [2, 0, 2], "scale": [2.0, 0.0, 2.0]}}}


def test_there_and_back(tmp_path):
    save_adapter(tmp_path / "a" / "best", ARRAYS, IDENTITY)
    loaded = load_adapter(tmp_path / "a" / "best", {n: jnp.zeros_like(a) for n, a in ARRAYS.items()}, IDENTITY)
    assert loaded.keys() == ARRAYS.keys()
    assert all(np.array_equal(loaded[n], ARRAYS[n]) for n in ARRAYS)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["best"]


def test_saving_again_replaces(tmp_path):
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    (tmp_path / ".best.part").mkdir()  # left by a process that was killed
    (tmp_path / ".best.part" / "junk").write_text("x")
    save_adapter(tmp_path / "best", {"b": jnp.ones(3)}, IDENTITY)
    assert np.array_equal(load_adapter(tmp_path / "best", {"b": jnp.zeros(3)}, IDENTITY)["b"], np.ones(3))
    assert not (tmp_path / "best" / "junk").exists()


def test_a_failure_while_saving_leaves_the_old_one(tmp_path, monkeypatch):
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(OSError):
        save_adapter(tmp_path / "best", {"b": jnp.ones(3)}, IDENTITY)
    monkeypatch.undo()
    assert load_adapter(tmp_path / "best", ARRAYS, IDENTITY).keys() == ARRAYS.keys()


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
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    with pytest.raises(InputError, match=f"does not fit this model and adapter config, in {told}"):
        load_adapter(tmp_path / "best", expected, IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arrays": 3}', '{"arrays": {"a": 1}}', '{"arrays": {"a": [3, "float32"]}}'])
def test_damaged_facts_are_told(tmp_path, text):
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    (tmp_path / "best" / "adapter.json").write_text(text)
    with pytest.raises(InputError, match="adapter.json: damaged"):
        load_adapter(tmp_path / "best", ARRAYS, IDENTITY)


def test_damaged_or_missing_arrays_are_told(tmp_path):
    with pytest.raises(InputError, match="no saved adapter here"):
        load_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    facts = json.loads((tmp_path / "best" / "adapter.json").read_text())
    assert facts["arrays"]["classifier.bias"] == [[2], "float32"]
    for file in (tmp_path / "best" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="best: damaged"):
        load_adapter(tmp_path / "best", ARRAYS, IDENTITY)


def test_no_flipped_bit_loads_other_numbers(tmp_path):
    folder, random = tmp_path / "best", np.random.default_rng(0)
    save_adapter(folder, ARRAYS, IDENTITY, classes=["down", "up"])
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    refused = 0
    for _ in range(60):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        try:
            loaded = load_adapter(folder, ARRAYS, IDENTITY)
            assert saved_classes(folder) == ("down", "up")
            assert all(np.array_equal(loaded[n], ARRAYS[n]) for n in ARRAYS)
        except InputError as error:
            refused += 1
            assert str(folder) in str(error)
        file.write_bytes(whole)
    assert refused > 40  # the others changed white space, or nothing that is read


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("base",), "f" * 16, "other weights"),
        (("method",), "dora", "adapter.method lora"),
        (("sites", "layers.attn.q_proj", "ranks"), [2, 2, 2], "other ranks at layers.attn.q_proj"),
        (("sites", "layers.attn.q_proj", "scale"), [1.0, 0.0, 1.0], "other scale at layers.attn.q_proj"),
        (("sites", "layers.attn.k_proj"), {"ranks": [1]}, "without layers.attn.k_proj"),
    ],
)
def test_another_base_method_rank_or_scale_is_refused_by_name(tmp_path, where, value, told):
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    other = copy.deepcopy(IDENTITY)
    part = other
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(InputError, match=told):
        load_adapter(tmp_path / "best", ARRAYS, other)


def test_an_adapter_of_an_older_version_is_read_with_a_word(tmp_path):
    save_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    file = tmp_path / "best" / "adapter.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({"format": 1, "arrays": facts["arrays"], "classes": None}))
    with pytest.warns(UserWarning, match="older version"):
        loaded = load_adapter(tmp_path / "best", ARRAYS, IDENTITY)
    assert all(np.array_equal(loaded[n], ARRAYS[n]) for n in ARRAYS)


def test_a_fingerprint_can_be_taken_as_in_another_dtype():
    wide, narrow = (nnx.Linear(3, 2, param_dtype=d, rngs=nnx.Rngs(0)) for d in (jnp.float32, jnp.bfloat16))
    narrow.kernel.set_value(wide.kernel[...].astype(jnp.bfloat16))
    assert fingerprint(wide, narrow) == fingerprint(narrow) != fingerprint(wide)
    assert fingerprint(wide, nnx.eval_shape(lambda: narrow)) == fingerprint(narrow)


@pytest.mark.slow
def test_commands_refuse_a_base_whose_weights_changed(hub, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(hub.llama, base)
    changes = {"model.source": str(base), "model.dtype": "bfloat16", "training.steps": 1, "training.eval_every": 0}
    trained = call("train", hub.write(tmp_path, changes, causal=True))
    assert trained.code == 0, trained.err
    run = tmp_path / "runs" / "tiny"
    commands = (
        ("evaluate", run),
        ("export", run, "--out", tmp_path / "out"),
        ("generate", run, "--prompt", "a film", "--max-new-tokens", "1"),
    )
    for command in commands[1:]:
        assert (called := call(*command)).code == 0, called.err
    shutil.rmtree(tmp_path / "out")
    file = next(base.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, file)
    for command in commands:
        called = call(*command)
        assert called.code == 2 and "model.source has" in called.err, (command, called.err)
    assert not (tmp_path / "out").exists()
