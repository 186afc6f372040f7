"""A run's batches: one shape, every example at most once an epoch, little padding, and any of them from its number alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batching import DISTINCT_EPOCHS, NO_TARGET, BatchPlan, Example, Examples
from lora_jax.errors import InputError
from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.weights.tokenizer import load_tokenizer


def examples(count: int, *, longest: int = 30, per_example: bool = True, seed: int = 0) -> Examples:
    """Example i's first token is 1000 + i, so that it can be told again."""
    rng = np.random.default_rng(seed)
    tokens = [np.array([1000 + i, *rng.integers(1, 99, rng.integers(1, longest))], np.int32) for i in range(count)]
    targets = []
    for t in tokens:
        wanted = np.arange(len(t)) == 0 if per_example else rng.random(len(t)) < 0.5
        wanted[0] = True  # at least one
        targets.append(np.where(wanted, rng.integers(0, 50, len(t)), NO_TARGET).astype(np.int32))
    return Examples(tokens, targets)


def plan_of(train: Examples, held_out: Examples | None = None, *, per_example: bool = True, **options) -> BatchPlan:
    values = {"batch_size": 8, "epochs": 3.0} | options
    return BatchPlan(train, held_out or examples(9, per_example=per_example, seed=7), per_example=per_example, **values)


def check(micro: dict[str, np.ndarray], source: Examples, *, per_example: bool) -> list[int]:
    """Reads a micro-batch back, comparing it with where it came from; returns the examples in it."""
    rows, length = micro["tokens"].shape
    count = len(micro["target_index"])
    for name in micro:
        assert micro[name].dtype == (np.float32 if name == "target_weights" else np.int32)
    filler = micro["target_weights"] == 0
    assert set(np.unique(micro["target_weights"])) <= {0.0, 1.0}
    assert (micro["target_index"][filler] == 0).all() and (micro["target_ids"][filler] == 0).all()
    labels = dict(zip(micro["target_index"][~filler].tolist(), micro["target_ids"][~filler].tolist(), strict=True))
    assert len(labels) == (~filler).sum()  # no position twice
    slots = {index: n for n, index in enumerate(micro["target_index"][~filler].tolist())}
    seen = []
    for row in range(rows):
        segments = micro["segment_ids"][row]
        real = segments[segments > 0]
        assert (segments[: len(real)] > 0).all()  # padding only at the end
        assert np.unique(real).tolist() == list(range(1, int(real.max(initial=0)) + 1)) and (np.diff(real) >= 0).all()
        assert (micro["tokens"][row, len(real) :] == 0).all() and (micro["positions"][row, len(real) :] == 0).all()
        for segment in range(1, int(real.max(initial=0)) + 1):
            at = np.flatnonzero(segments == segment)
            i = int(micro["tokens"][row, at[0]]) - 1000
            seen.append(i)
            assert micro["tokens"][row, at].tolist() == source.tokens[i].tolist()
            assert micro["positions"][row, at].tolist() == list(range(len(at)))
            found = [labels.pop(row * length + int(c), NO_TARGET) for c in at]
            assert found == source.targets[i].tolist()
            if per_example:
                slot = slots[row * length + int(at[0])]
                assert (micro["example_ids"][row, at] == slot).all()
        if per_example:
            assert (micro["example_ids"][row, len(real) :] == count).all()
    assert not labels  # no target that belongs to nothing
    assert per_example == ("example_ids" in micro)
    return seen


def micros(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: array[k] for name, array in batch.items()} for k in range(len(batch["tokens"]))]


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(8, 30),
    accumulate=st.sampled_from([1, 2, 4]),
    batching=st.sampled_from(["packed", "padded"]),
    per_example=st.booleans(),
    row_multiple=st.sampled_from([1, 4]),
    longest=st.integers(2, 40),
)
def test_three_epochs_read_back(count, accumulate, batching, per_example, row_multiple, longest):
    train = examples(count, longest=longest, per_example=per_example)
    plan = plan_of(train, per_example=per_example, accumulate=accumulate, batching=batching, row_multiple=row_multiple)
    assert plan.rows % row_multiple == 0 and plan.length % 8 == 0
    shapes = set()
    for epoch in range(3):
        seen: list[int] = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            batch = plan.batch(step)
            shapes.add(tuple((name, array.shape) for name, array in sorted(batch.items())))
            assert batch["tokens"].shape == (accumulate, plan.rows, plan.length)
            assert batch["target_ids"].shape == (accumulate, plan.targets)
            for micro in micros(batch):
                inside = check(micro, train, per_example=per_example)
                assert len(inside) == 8 // accumulate
                seen += inside
        assert len(seen) == len(set(seen)) == count // 8 * 8
    assert len(shapes) == 1


def of_parts(count: int, *, seed: int = 0) -> Examples:
    """Examples of one to three texts; text k of example i starts with the token 1000 + 10 i + k and has the role 2 - k."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        texts = [np.array([1000 + 10 * i + k, *rng.integers(1, 99, rng.integers(1, 12))], np.int32) for k in range(1 + i % 3)]
        starts = np.cumsum([0, *map(len, texts[:-1])])
        targets = np.concatenate([np.where(np.arange(len(t)) > 0, t, NO_TARGET) for t in texts]).astype(np.int32)
        parts = np.array([(start, 2 - k) for k, start in enumerate(starts)], np.int32)
        made.append(Example(np.concatenate(texts), targets, parts=parts))
    return Examples.of(made)


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_examples_of_several_texts(batching, accumulate):
    """Each text is a segment with positions of its own, all of an example are in one row, and a target knows its example and role."""
    train, held = of_parts(24), of_parts(7, seed=1)
    plan = plan_of(train, held, per_example=False, batching=batching, accumulate=accumulate)
    seen = []
    batches = [m for step in range(3) for m in micros(plan.batch(step))]
    for micro, source in [(m, train) for m in batches] + [(m, held) for m in plan.eval_batches()]:
        real = micro["target_weights"] > 0
        assert micro["example_weights"].shape == (8 // accumulate,) and set(micro["example_weights"]) <= {0.0, 1.0}
        tokens, segments, positions = (micro[n].reshape(-1) for n in ("tokens", "segment_ids", "positions"))
        owners = {}
        for at, example, role in zip(micro["target_index"][real], micro["target_examples"][real], micro["target_roles"][real], strict=True):
            first = at - positions[at]
            number, k = divmod(int(tokens[first]) - 1000, 10)
            assert role == 2 - k and owners.setdefault(int(example), (number, at // plan.length)) == (number, at // plan.length)
            text = tokens[first : first + len(source.tokens[number][source.texts(number)[k]])]
            assert text.tolist() == source.tokens[number][source.texts(number)[k]].tolist()
            assert len(set(segments[first : first + len(text)])) == 1
        assert len(owners) == micro["example_weights"].sum()
        assert not micro["target_examples"][~real].any() and not micro["target_roles"][~real].any()
        seen += [number for number, _ in owners.values()] if source is train else []
    assert sorted(seen) == list(range(24))
    assert train.longest_text < train.sizes.max() and plan.seen().parts is not None


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("per_example", [True, False])
def test_held_out_examples_come_once_each_in_the_training_shapes(batching, per_example):
    held = examples(37, longest=44, per_example=per_example, seed=5)  # longer ones than in training
    plan = plan_of(examples(40, per_example=per_example), held, per_example=per_example, batching=batching)
    batches = plan.eval_batches()
    seen = [i for batch in batches for i in check(batch, held, per_example=per_example)]
    assert sorted(seen) == list(range(37))
    trained = plan.batch(0)
    assert all({n: a.shape for n, a in b.items()} == {n: a.shape[1:] for n, a in trained.items()} for b in batches)


def test_padded_rows_hold_one_example_each():
    plan = plan_of(examples(40), batching="padded", accumulate=2)
    assert plan.rows == 4
    assert (plan.batch(0)["segment_ids"].max(axis=-1) == 1).all()
    assert (plan_of(examples(40, longest=12), batching="packed").batch(0)["segment_ids"].max(axis=-1) > 1).any()


def test_batching_changes_the_layout_and_not_which_examples_meet():
    def members(batching: str) -> list[set[int]]:
        plan = plan_of(examples(40), batching=batching)
        return [set(plan.batch(s)["tokens"][plan.batch(s)["tokens"] >= 1000].tolist()) for s in range(10)]

    assert members("packed") == members("padded")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_iterating_equals_asking_from_any_step():
    plan, fresh = plan_of(examples(40), accumulate=2), plan_of(examples(40), accumulate=2)
    for start in (0, 3, 7):
        ahead = list(plan.batches(start, 12))
        assert len(ahead) == 12 - start
        assert all(same(batch, fresh.batch(start + i)) for i, batch in enumerate(ahead))
    assert list(plan.batches(5, 5)) == []


def test_the_seed_decides_the_order_and_nothing_else_does():
    one, again, other = (plan_of(examples(40), seed=s) for s in (1, 1, 2))
    assert all(same(one.batch(s), again.batch(s)) for s in range(6))
    assert not all(same(one.batch(s), other.batch(s)) for s in range(6) if one.batch(s)["tokens"].shape == other.batch(s)["tokens"].shape)


def test_epochs_differ_in_order_and_in_what_is_left_over():
    plan = plan_of(examples(45), epochs=6.0)
    epochs = []
    for e in range(6):
        batches = [plan.batch(e * 5 + s)["tokens"] for s in range(5)]
        epochs.append(tuple(frozenset(b[b >= 1000].tolist()) for b in batches))
    assert len(set(epochs)) == 6
    assert len({frozenset().union(*e) for e in epochs}) > 1


def test_late_epochs_fit_the_same_shape():
    train = examples(17, longest=60, seed=3)
    plan = plan_of(train, epochs=float(DISTINCT_EPOCHS + 4))
    early, late = 2 * 3, 2 * (DISTINCT_EPOCHS + 3)  # the same members come again after DISTINCT_EPOCHS
    assert plan.batch(late)["tokens"].shape == plan.batch(0)["tokens"].shape
    for step in range(late, late + 2):
        check(micros(plan.batch(step))[0], train, per_example=True)

    def members(start: int) -> set[frozenset[int]]:
        return {frozenset(t[t >= 1000].tolist()) for t in (plan.batch(s)["tokens"] for s in (start, start + 1))}

    assert members(early) == members(late)


@pytest.mark.parametrize(
    "options, steps", [({"steps": 7, "epochs": None}, 7), ({"epochs": 2.0}, 10), ({"epochs": 0.5}, 2), ({"epochs": 0.01}, 1)]
)
def test_how_many_steps(options, steps):
    assert plan_of(examples(40), **options).steps == steps


def test_too_few_examples():
    with pytest.raises(InputError, match="training.batch_size: 8, but there are only 7 training examples"):
        plan_of(examples(7))


def test_the_figures_are_those_of_the_batches():
    plan = plan_of(examples(40), accumulate=2)
    batches = [plan.batch(s) for s in range(plan.steps)]
    useful = np.mean([(b["segment_ids"] > 0).sum() for b in batches])
    assert plan.summary["tokens_per_step"] == pytest.approx(useful)
    assert plan.summary["padding_share"] == pytest.approx(1 - useful / batches[0]["tokens"].size)


def test_film_reviews_hardly_need_padding(minilm_source, reviews_source):
    columns = {"text": "text", "label": "category", "drop": {"category": ["plot"]}}
    task = task_section(kind="classification", source=reviews_source, max_length=64, eval_size=1000, **columns)
    data = prepare(task, load_tokenizer(minilm_source), decoder=False)
    plan = BatchPlan(data.train, data.held_out, batch_size=32, per_example=True, epochs=3.0)
    assert plan.steps_per_epoch == (12808 - 1000) // 32
    assert plan.summary["padding_share"] < 0.06
    assert plan.summary["dynamic_padding_share"] > 0.4  # what padding each batch to its longest review would waste
    seen = sum(int(b["target_weights"].sum()) for b in plan.eval_batches())
    assert seen == 1000


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_examples_of_a_step_do_not_depend_on_accumulate(batching):
    def steps(accumulate: int) -> list[list[int]]:
        plan = plan_of(examples(50), epochs=DISTINCT_EPOCHS + 1, accumulate=accumulate, batching=batching)
        batches = [plan.batch(s)["tokens"] for s in (0, 1, 5, 6, plan.steps - 1)]
        return [sorted(tokens[tokens >= 1000].tolist()) for tokens in batches]

    assert steps(1) == steps(2) == steps(4)
    assert plan_of(examples(50)).order != plan_of(examples(50), accumulate=2).order
