"""The held-out rows are as many as asked for, never trained on, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.split import sample_rows, split_rows
from lora_jax.errors import InputError


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(0, 5), st.data())
def test_distinct_rows_are_cut_in_two(count, seed, data):
    held_out = data.draw(st.integers(1, count - 1))
    train, held, _ = split_rows([str(i) for i in range(count)], held_out=held_out, train=None, seed=seed)
    assert len(held) == held_out
    assert sorted([*train, *held]) == list(range(count))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=40), st.integers(0, 5))
def test_equal_texts_stay_on_one_side(texts, seed):
    try:
        train, held, _ = split_rows(texts, held_out=3, train=None, seed=seed)
    except InputError:
        return  # the copies did not add up to three
    assert not {texts[i] for i in train} & {texts[i] for i in held}
    assert sorted([*train, *held]) == list(range(len(texts)))


def test_the_seed_decides():
    texts = [str(i) for i in range(50)]
    first, again, other = (split_rows(texts, held_out=10, train=None, seed=s) for s in (3, 3, 4))
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
    assert set(first[1]) != set(other[1])


def test_fewer_training_rows_are_some_of_the_more():
    texts = [str(i) for i in range(50)]
    few, many = (split_rows(texts, held_out=10, train=n, seed=0) for n in (5, 20))
    assert (len(few[0]), len(many[0])) == (5, 20)
    assert set(few[0]) < set(many[0])
    assert few[1].tolist() == many[1].tolist()


@pytest.mark.parametrize("held_out", [4, 5])
def test_nothing_left_to_train_on(held_out):
    with pytest.raises(InputError, match=f"task.eval_size: {held_out} of 4 rows leaves no row"):
        split_rows(list("abcd"), held_out=held_out, train=None, seed=0)


def test_texts_that_repeat_too_often():
    with pytest.raises(InputError, match="task.eval_size: .*repeat"):
        split_rows(["a"] * 5 + ["b"] * 5, held_out=3, train=None, seed=0)


def test_a_sample_of_a_separate_file():
    assert sorted(sample_rows(6, size=None, seed=0)) == list(range(6))
    assert sorted(sample_rows(6, size=99, seed=0)) == list(range(6))
    assert sample_rows(6, size=4, seed=1).tolist() == sample_rows(6, size=None, seed=1).tolist()[:4]
    assert sample_rows(60, size=9, seed=1).tolist() != sample_rows(60, size=9, seed=2).tolist()


@settings(deadline=None)
@given(st.integers(3, 60), st.integers(0, 5), st.data())
def test_test_rows_are_a_third_part_and_move_nothing_else(count, seed, data):
    held_out = data.draw(st.integers(1, count - 2))
    test = data.draw(st.integers(1, count - held_out - 1))
    texts = [str(i) for i in range(count)]
    train, held, tested = split_rows(texts, held_out=held_out, train=None, seed=seed, test=test)
    assert len(tested) == test and sorted([*train, *held, *tested]) == list(range(count))
    without = split_rows(texts, held_out=held_out, train=len(train), seed=seed)
    assert held.tolist() == without[1].tolist() and train.tolist() == without[0].tolist() and not len(without[2])


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=40), st.integers(0, 5))
def test_copies_of_a_test_row_are_test_rows(texts, seed):
    try:
        parts = split_rows(texts, held_out=3, train=None, seed=seed, test=4)
    except InputError:
        return
    of = [{texts[i] for i in part} for part in parts]
    assert not of[0] & of[1] and not of[0] & of[2] and not of[1] & of[2]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(texts)))


def test_test_rows_that_cannot_be_had():
    with pytest.raises(InputError, match="task.test_size: 4 of 6 rows, of which 2 are held out, leaves no row to train on"):
        split_rows(list("abcdef"), held_out=2, train=None, seed=0, test=4)
    with pytest.raises(InputError, match="task.test_size: 6 of 6 rows leaves no row"):
        split_rows(list("abcdef"), held_out=0, train=None, seed=0, test=6)
    with pytest.raises(InputError, match="task.test_size: .*repeat"):
        split_rows(["a"] * 5 + ["b"] * 5, held_out=0, train=None, seed=0, test=3)
