"""YAML is read by the 1.2 core rules, safely, and written so that it reads back the same."""

import datetime
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.config.yaml import dump, parse
from lora_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("010", 10),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-02", "2024-01-02"),
        ("'8'", "8"),
        ("last:4", "last:4"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got, _ = parse(f"key: {text}", "x")
    assert got == {"key": value}
    assert type(got["key"]) is type(value)


def test_lines_of_keys():
    _, lines = parse("# comment\na:\n  b: 1\n  c:\n    - d: 2\n", "x")
    assert lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", 0, "d"): 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml, line 3: the key 'a' was already given on line 1."),
        ("a:\n  b: 1\n  b: 2", "f.yaml, line 3: the key 'a.b' was already given on line 2."),
        ("a: [1\nb: 2", "f.yaml, line 2, column 2: broken YAML"),
        ("a:\n\tb: 1", "line 2, column 1: broken YAML: a tab stands where spaces are needed"),
        ("a: !!python/object/apply:os.system [echo]", "python/object/apply:os.system are not allowed"),
        ("a: !!python/name:os.system", "are not allowed"),
        ("a: &x [*x]", "an alias refers to a node that contains it"),
        ("a: *nowhere", "line 1, column 4: broken YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "not allowed"),
        ("[" * 5000, "broken YAML"),
        ("? [a]\n: 1", "broken YAML"),
    ],
)
def test_what_a_config_may_not_hold(text, message):
    with pytest.raises(InputError) as caught:
        parse(text, "f.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.yaml")


def test_aliases_that_unfold_beyond_reason_are_refused():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(InputError, match="more than 100,000 values"):
        parse("\n".join(levels), "f.yaml")


def test_ordinary_aliases_and_merges_work():
    got, _ = parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a", "f")
    assert got == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.<_-1", min_size=1), inner, max_size=3)
)


@given(values)
def test_dump_reads_back_the_same(value):
    again, _ = parse(dump({"key": value}), "x")
    assert again == {"key": value}


@pytest.mark.parametrize("text", ["no", "1e-3", "2024-01-02", "1_000", "0o17", "null", "a: b", "{text}\nAnswer:", "<<"])
def test_dumped_text_is_text_to_other_readers_too(text):
    assert yaml.safe_load(dump({"key": text})) == {"key": text}
    assert not isinstance(yaml.safe_load(dump({"key": text}))["key"], datetime.date)
    assert dump({"key": text}).count("\n") == 1
