"""Sizes in bytes, as people write them; and numbers and files that are larger than anybody means."""

import copy
import time

import pytest

from lora_jax.config.load import load_config
from lora_jax.config.types import size_text, to_bytes
from lora_jax.config.yaml import dump, parse
from lora_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("512M", 512 * 10**6), ("1.5KiB", 1536), ("77", 77), (77, 77), ("2 TB", 2 * 10**12)],
)
def test_sizes(text, size):
    assert to_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", 0, "0.2", True, None, [8], "8 bananas", "1e3", "8GBB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="such as 8GB"):
        to_bytes(text)


def test_sizes_for_people():
    assert [size_text(s) for s in (999, 1000, 8 * 10**9, 123_456_789)] == ["999 B", "1 KB", "8 GB", "123 MB"]


WHOLE = {
    "name": "a",
    "model": {"source": "m.gguf"},
    "task": {"kind": "classification", "source": "x.csv", "text": "t", "label": "l"},
    "training": {"steps": 1},
}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.seed", 2**32, "training.seed"),
        ("training.data_seed", 2**63, "training.data_seed"),
        ("training.steps", 2**31, "training.steps"),
        ("training.extend_steps", 2**31, "training.extend_steps"),
        ("training.epochs", 1e308, "training.epochs"),
        ("training.batch_size", 10**30, "training.batch_size"),
        ("task.max_length", 10**30, "task.max_length"),
        ("task.split_seed", 2**63, "task.split_seed"),
        ("sweep", {"grid": {"adapter.rank": [2]}, "halving": {"rungs": 10**9}}, "sweep.halving.rungs"),
        ("sweep", {"seeds": 10**9}, "sweep.seeds"),
        ("sweep", {"seeds": [2**32]}, "sweep.seeds"),
        ("sweep", {"random": {"count": 10**9, "keys": {"adapter.rank": {"choice": [2]}}}}, "sweep.random.count"),
        ("sweep", {"grid": {"adapter.rank": [2]}, "reference": 2}, "sweep.reference"),
        ("sweep", {"grid": {"adapter.rank": [2]}, "reference": {2: 2}}, "sweep.reference"),
        ("name", "n" * 256, "name"),
    ],
)
def test_numbers_beyond_what_can_be_held_are_refused(tmp_path, key, value, told):
    values = copy.deepcopy(WHOLE)
    section, _, leaf = key.partition(".")
    if leaf:
        values[section][leaf] = value
    else:
        values[section] = value
    if leaf == "epochs":
        del values["training"]["steps"]
    (tmp_path / "a.yaml").write_text(dump(values))
    with pytest.raises(InputError) as refused:
        load_config(tmp_path / "a.yaml")
    assert told in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a: [" + "1, " * 100_001 + "1]", "a:\n" + "- 1\n" * 2_500_000], ids=["many values", "10 MB"])
def test_a_huge_yaml_is_refused_before_it_is_built(text):
    began = time.monotonic()
    with pytest.raises(InputError, match=r"x: holds (more than 100,000 values|10,000,003 characters)"):
        parse(text, "x")
    assert time.monotonic() - began < 60
