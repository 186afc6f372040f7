"""How SQuAD (arXiv:1606.05250, section 6.1) scores an answer: exact match and F1 of words, after the same clean-up of both texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str) -> str:
    """The text in lower case, without punctuation, articles and more than one space in a row.

    >>> cleaned("The  U.S.A., a land")
    'usa land'
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(given: str, right: Sequence[str]) -> float:
    """1 where an answer equals one of the right ones, else 0. No right one: 1 for the empty answer."""
    return float(any(cleaned(given) == cleaned(r) for r in right or [""]))


def f1(given: str, right: Sequence[str]) -> float:
    """The best F1 of an answer's words with a right one's, 0 to 1; where either has no word, whether both have none."""
    return max(_f1(cleaned(given).split(), cleaned(r).split()) for r in right or [""])


def _f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    return 2 * sum((Counter(given) & Counter(right)).values()) / (len(given) + len(right))
