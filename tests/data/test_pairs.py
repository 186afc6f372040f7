"""Sources and targets in rows: each example whole and once, in one row of both, and its targets where its decoder tokens are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batching import NO_TARGET
from lora_jax.data.order import best_fit, rows_needed
from lora_jax.data.pairs import Shift, source_target
from tests import tiny_pairs

CASES = [{"batching": "packed"}, {"batching": "padded"}, {"batching": "packed", "accumulate": 2, "row_multiple": 4}]


def pairs_in(micro: dict[str, np.ndarray]) -> list[tuple[bytes, bytes, bytes]]:
    """(source, decoder tokens, targets) of every example, as bytes."""
    wanted = np.full(micro["decoder_tokens"].size, NO_TARGET, np.int32)
    count = int(micro["target_weights"].sum())
    assert (micro["target_weights"][:count] == 1).all() and len(set(micro["target_index"][:count].tolist())) == count
    wanted[micro["target_index"][:count]] = micro["target_ids"][:count]
    wanted = wanted.reshape(micro["decoder_tokens"].shape)
    found = []
    for row, (segments, own) in enumerate(zip(micro["segment_ids"], micro["decoder_segment_ids"], strict=True)):
        assert set(segments.tolist()) - {0} == set(own.tolist()) - {0}
        for number in sorted(set(segments.tolist()) - {0}):
            source, target = segments == number, own == number
            assert micro["positions"][row][source].tolist() == list(range(source.sum()))
            assert micro["decoder_positions"][row][target].tolist() == list(range(target.sum()))
            parts = micro["tokens"][row][source], micro["decoder_tokens"][row][target], wanted[row][target]
            found.append(tuple(part.tobytes() for part in parts))
    return found


@pytest.mark.parametrize("options", CASES, ids=str)
def test_an_epoch_holds_each_example_once(options):
    plan, examples = tiny_pairs.plan(**options, steps=5), tiny_pairs.examples(40)
    columns = (examples.tokens, examples.decoder_tokens or [], examples.targets)
    whole = sorted(tuple(a.tobytes() for a in one) for one in zip(*columns, strict=True))
    found = []
    for step in range(5):
        batch = plan.batch(step)
        micros = [{name: a[i] for name, a in batch.items()} for i in range(len(batch["tokens"]))]
        assert all(m["tokens"].shape == (plan.rows, plan.length) for m in micros)
        assert all(m["decoder_tokens"].shape == (plan.rows, plan.decoder_length) for m in micros)
        found += [pair for micro in micros for pair in pairs_in(micro)]
    assert sorted(found) == whole
    held_out = [pair for micro in plan.eval_batches() for pair in pairs_in(micro)]
    assert len(held_out) == 9
    assert 0 <= plan.summary["padding_share"] < 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12))
def test_a_row_has_room_for_both(sizes):
    group = np.array(sizes)[None]
    rows = best_fit(group, (9, 5))[0]
    for row in set(rows.tolist()):
        assert (group[0][rows == row].sum(axis=0) <= (9, 5)).all()
    assert rows_needed(group, (9, 5))[0] == rows.max() + 1 and sorted(set(rows.tolist())) == list(range(rows.max() + 1))


def test_a_target_is_shifted():
    example = source_target([5, 6], [7, 8, 1], Shift(0), 8)
    assert example.decoder_tokens is not None and example.decoder_tokens.tolist() == [0, 7, 8] and example.targets.tolist() == [7, 8, 1]
    assert not example.cut and not example.end_cut
    example = source_target([5, 6], [7, 8, 1, 40], Shift(None), 3)
    assert example.decoder_tokens is not None and example.decoder_tokens.tolist() == [40, 7, 8] and example.targets.tolist() == [7, 8, 1]
    assert example.cut and example.end_cut
