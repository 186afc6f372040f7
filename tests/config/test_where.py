"""A sweep's condition: what it understands, and that it can run nothing."""

import contextlib

import pytest

from lora_jax.config.where import Where
from lora_jax.errors import InputError

VALUES = {
    "adapter.rank": 8,
    "adapter.alpha": 16.0,
    "adapter.targets": ["q_proj", "v_proj"],
    "adapter.rslora": False,
    "adapter.layers": None,
    "optimizer.learning_rate": 1e-3,
    "training.seed": 2,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("rank <= 8", True),
        ("adapter.rank < 8", False),
        ("4 < rank <= 8", True),
        ("8 < rank <= 8", False),
        ("rank == 8 and alpha / rank == 2", True),
        ("rank > 8 or not rslora", True),
        ("not (rank > 8 or not rslora)", False),
        ("training.seed in [0, 1]", False),
        ("training.seed not in (0, 1)", True),
        ("'q_proj' in targets", True),
        ("targets == ['q_proj', 'v_proj']", True),
        ("layers == None", True),
        ("learning_rate * alpha - 0.016 == 0", True),
        ("-rank < -7", True),
        ("rslora", False),
        ("True", True),
        ("  rank == 8  ", True),
    ],
)
def test_what_holds(text, holds):
    assert Where(text)(VALUES) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0].__subclasses__()",
        "rank.__class__",
        "adapter.__dict__",
        "__builtins__",
        "open('/etc/passwd')",
        "rank()",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "rank if rank else rank",
        "rank ** rank",
        "rank // 2",
        "rank << 4000000000",
        "targets[0]",
        "f'{rank}'",
        "(rank := 3)",
        "{1: 2}",
        "rank is None",
        "b'x' == rank",
        "...",
        "'a'.join(targets)",
        "",
        "rank <",
        "rank; rank",
        "rank\nrank",
        "(" * 300 + "rank" + ")" * 300,
        "rank == 8 " + "and rank == 8 " * 100,
        "\x00",
    ],
)
def test_what_is_refused(text):
    with pytest.raises(InputError) as error:
        Where(text)(VALUES)
    assert str(error.value).startswith("sweep.where: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["not " * 240 + "rslora", "-" * 900 + "1 == 1", "[" * 90 + "1" + "]" * 90 + " == 1"])
def test_deep_expressions_have_a_value_or_are_refused(text):
    with contextlib.suppress(InputError):
        assert Where(text)(VALUES) in (True, False)


def test_unknown_and_unclear_names():
    with pytest.raises(InputError, match=r"Did you mean 'adapter\.rank'"):
        Where("rnk < 3")
    with pytest.raises(InputError, match=r"model\.source or task\.source"):
        Where("source == 'x'")
    assert Where("adapter.dropout == 0")({"adapter.dropout": 0.0})


@pytest.mark.parametrize(
    "text", ["targets < 3", "rank / (rank - 8) > 1", "targets + 1 == 2", "rslora + 1 == 2", "1 in rank", "'a' * 3 == 'aaa'"]
)
def test_values_that_do_not_go_together(text):
    with pytest.raises(InputError, match="cannot be evaluated for a member"):
        Where(text)(VALUES)


def test_numbers_cannot_grow_without_end():
    with pytest.raises(InputError):
        Where("*".join(["9" * 200] * 6) + " > 1.5 * " + "9" * 400)(VALUES)
