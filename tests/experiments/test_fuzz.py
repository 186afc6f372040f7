"""The first cases of each kind of `experiments/fuzz.py` that takes no process of its own: none is a fault, and faults would be seen."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest

from experiments.fuzz_inputs import fuzz_configs, fuzz_files, mutated, tally
from lora_jax.errors import InputError


@pytest.mark.long
@pytest.mark.parametrize(("fuzz", "count"), [(fuzz_files, 100), (fuzz_configs, 12)])
def test_the_first_cases_are_read_or_refused(tmp_path, fuzz, count):
    counts = fuzz(tmp_path, count, 0)
    assert counts["faults"] == [] and counts["refused"] > 0
    assert counts["refused"] + counts.get("read", 0) + counts.get("planned", 0) == counts["tried"] == count


def test_faults_are_counted_with_their_numbers():
    made = iter([lambda: "read", lambda: 1 / 0, lambda: time.sleep(5), InputError("x").__str__])
    counts = tally("part", 4, 0.2, lambda rng: next(made)(), 0)
    assert counts["read"] == counts["x"] == 1 and len(counts["faults"]) == 2
    assert counts["faults"][0].startswith("part 1: ZeroDivisionError") and "part 2: TooLong: took more than 0.2 s" in counts["faults"]


def test_a_mutation_leaves_the_original_alone():
    values = {"a": {"b": [1, 2]}, "c": "text"}
    before = copy.deepcopy(values)
    found = [mutated(values, ["a.b", "c", "d.e"], np.random.default_rng(seed)) for seed in range(40)]
    assert values == before and sum(one != values for one in found) > 30
