"""The `where:` of a sweep: a condition on a member's config values, read as an expression and never run as code.

    rank <= 8 or targets != 'mlp'
    optimizer.learning_rate * adapter.alpha / adapter.rank < 0.1
    seed in [0, 1] and not rslora

Names are config keys, whole or by their last part; of several keys with that part the one nearest the top is meant. There are
comparisons, `in`, `and`, `or`, `not`, brackets, numbers, text, lists and the four arithmetic operations on numbers; nothing else is
understood, so nothing else can happen.

Not on simpleeval: its calls, attributes, subscripts, comprehensions, bit shifts and powers would have to be taken out again and
dotted keys put in, in as many lines as are here; and unknown names would be found when a member has a value, not when it is read.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError
from .messages import unknown_key, valid_keys

_LONGEST = 1000
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Where:
    """A condition on dotted config keys.

    Args:
        text: the expression.
        where: what to call it in messages.

    Raises:
        InputError: it is not an expression of the kind above, or names no config key.

    >>> Where("rank <= 8 and targets != 'mlp'")({"adapter.rank": 4, "adapter.targets": "attention"})
    True
    """

    def __init__(self, text: str, where: str = "sweep.where"):
        self._text, self._where = text, where
        if len(text) > _LONGEST:
            raise InputError(f"{where}: is longer than {_LONGEST} characters.")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            self._test = self._read(tree)
        except InputError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise InputError(f"{where}: '{self._shown}' is not a valid expression. Example: rank <= 8 or targets != 'mlp'") from None

    def __call__(self, values: Mapping[str, Any]) -> bool:
        """Whether it holds for the values of (at least) the keys it names.

        Raises:
            InputError: values that do not go together, such as a text and a number in `<`.
        """
        try:
            return bool(self._test(values))
        except (TypeError, ZeroDivisionError, OverflowError, RecursionError) as error:
            raise InputError(f"{self._where}: '{self._shown}' cannot be evaluated for a member: {error}.") from None

    @property
    def _shown(self) -> str:
        text = " ".join(self._text.split())
        return text if len(text) <= 80 else text[:77] + "..."

    def _read(self, node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
        match node:
            case ast.BoolOp(op=op, values=parts):
                tests = [self._read(part) for part in parts]
                return (lambda v: all(t(v) for t in tests)) if isinstance(op, ast.And) else (lambda v: any(t(v) for t in tests))
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                test = self._read(inner)
                return lambda v: not test(v)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                number = self._read(inner)
                return lambda v: -_number(number(v))
            case ast.Compare(left=first, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
                sides = [self._read(side) for side in (first, *rest)]
                compare = [_COMPARE[type(op)] for op in ops]
                return lambda v: _chain([side(v) for side in sides], compare)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                a, b, combine = self._read(left), self._read(right), _ARITHMETIC[type(op)]
                return lambda v: combine(_number(a(v)), _number(b(v)))
            case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float, str)):
                return lambda v: value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                inner_values = [self._read(item) for item in items]
                return lambda v: [item(v) for item in inner_values]
            case ast.Name() | ast.Attribute():
                key = self._key(node)
                return lambda v: v[key]
        kind = {"Call": "a call", "Subscript": "an index", "Pow": "a power"}.get(type(node).__name__, "this")
        raise InputError(f"{self._where}: {kind} ({ast.unparse(node)[:60]}) is not supported; use keys, values, comparisons and + - * /.")

    def _key(self, node: ast.expr) -> str:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise InputError(f"{self._where}: '.{parts[-1]}' follows something that is not a config key.")
        name = ".".join([node.id, *reversed(parts)])
        keys = [key for key in valid_keys() if key == name or key.endswith(f".{name}")]
        if name in keys:
            return name
        depth = min((key.count(".") for key in keys), default=0)
        keys = [key for key in keys if key.count(".") == depth]
        if len(keys) == 1:
            return keys[0]
        if keys:
            raise InputError(f"{self._where}: '{name}' is ambiguous: {' or '.join(keys)}. Write the full key.")
        raise InputError(f"{self._where}: {unknown_key(name)}")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    return value


def _chain(values: list[Any], compare: list[Callable[[Any, Any], bool]]) -> bool:
    return all(test(a, b) for test, a, b in zip(compare, values, values[1:], strict=False))
