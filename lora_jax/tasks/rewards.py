"""Rewards of completions: plain Python functions of texts, by name, with what is said where one fails.

A reward is `function(completion, prompt, references) -> float`; larger is better. A config names built-in ones (`exact`, or with an
argument `contains:yes`), functions of the user (`package.module:function`), or several with their weights. A function should give equal
rewards to equal completions: a run that is resumed asks again.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from ..config.doors import Door
from ..data.prompts import Prompts
from ..errors import InputError, hint, warn
from .evaluators import EVALUATORS, Evaluator, register
from .text_metrics import exact, normalised, number, token_f1

# completion, prompt, references -> reward.
Reward = Callable[[str, str, Sequence[str]], float]
# Name -> makes a reward of the argument that stands after the name's colon; "" where there is none. `ValueError` where that will not do.
REWARDS: Door[Callable[[str], Reward]] = Door("reward", "lora_jax.tasks", "lora_jax.rewards")

REWARD = register(Evaluator("reward", True))
# Names of those that ask what is right.
_OF_REFERENCES = ("exact", "normalised", "number", "token_f1")


def _metric(name: str, score: Callable[[str, Sequence[str]], float]) -> Callable[[str], Reward]:
    def make(argument: str) -> Reward:
        if argument:
            raise ValueError(f"'{name}' takes no argument")
        return lambda completion, prompt, references: score(completion, references)

    return make


def _contains(argument: str) -> Reward:
    """1 where the word stands in the completion, whatever its case."""
    if not argument.strip():
        raise ValueError("'contains' needs a word: contains:WORD")
    word = re.compile(rf"(?<!\w){re.escape(argument.strip())}(?!\w)", re.IGNORECASE)
    return lambda completion, prompt, references: float(word.search(completion) is not None)


def _regex(argument: str) -> Reward:
    """1 where the pattern is found in the completion."""
    try:
        pattern = re.compile(argument, re.DOTALL)
    except re.error as error:
        raise ValueError(f"'regex:{argument}': {error}") from None
    if not argument:
        raise ValueError("'regex' needs a pattern: regex:PATTERN")
    return lambda completion, prompt, references: float(pattern.search(completion) is not None)


def _length(argument: str) -> Reward:
    """1 where the completion has so many words; less by 1 / (so many) for each word more or fewer, down to 0."""
    if not argument.isdigit() or not int(argument):
        raise ValueError(f"'length' needs a number of words: length:20, got {argument!r}")
    wanted = int(argument)
    return lambda completion, prompt, references: max(0.0, 1.0 - abs(len(completion.split()) - wanted) / wanted)


_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def _format(argument: str) -> Reward:
    """1 where the completion is thoughts and an answer, marked as in arXiv:2501.12948, and nothing else."""
    if argument:
        raise ValueError("'format' takes no argument")
    return lambda completion, prompt, references: float(_FORMAT.fullmatch(completion) is not None)


for _name, _score in zip(_OF_REFERENCES, (exact, normalised, number, token_f1), strict=True):
    REWARDS.register(_name, _metric(_name, _score))
for _name, _make in (("contains", _contains), ("regex", _regex), ("length", _length), ("format", _format)):
    REWARDS.register(_name, _make)


def weights_of(value: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Reward, as the config names it -> its weight."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict.fromkeys([value] if isinstance(value, str) else value, 1.0)


def asks_for_references(value: str | Sequence[str] | Mapping[str, float]) -> str | None:
    """The first reward that cannot do without references."""
    return next((name for name in weights_of(value) if name in _OF_REFERENCES), None)


def made(named: str, *, imported: bool = True) -> Reward | None:
    """The reward that a config names.

    Args:
        imported: False imports no module of the user's: None stands for a function of one.

    Raises:
        ValueError: there is none of this name, or its argument will not do.
    """
    name, colon, argument = named.partition(":")
    if name in REWARDS.all():
        return REWARDS.all()[name](argument)
    if not colon:
        raise ValueError(f"there is no reward '{named}'. {hint(named, REWARDS)} Or a function: package.module:function".rstrip(". "))
    if not re.fullmatch(r"[\w.]+", name) or not re.fullmatch(r"[\w.]+", argument):
        raise ValueError(f"'{named}' is neither a reward nor package.module:function. {hint(name, REWARDS)}".rstrip(". "))
    if not imported:
        return None
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # the user's module may fail in any way it likes
        raise ValueError(f"'{named}': cannot import {name}: {type(error).__name__}: {error}") from None
    for part in argument.split("."):
        if not hasattr(found, part):
            functions = [n for n, thing in vars(found).items() if callable(thing) and not n.startswith("_")]
            raise ValueError(f"'{named}': {name} has no '{part}'. {hint(part, functions)}".rstrip(". "))
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"'{named}' is a {type(found).__name__}, not a function")
    return cast(Reward, found)


class Judge:
    """Rewards completions of some prompts, on the host.

    Args:
        rewards: as the config names them -> weight.
        tokenizer: makes texts of tokens.
        prompts: their inputs are what rewards are given as prompt, and their references.
        metrics: evaluators of texts, to be computed beside the reward when it scores an evaluation.

    Raises:
        InputError: there is no such reward.
    """

    def __init__(self, rewards: Mapping[str, float], tokenizer: Any, prompts: Prompts, metrics: Sequence[str] = ()):
        self.tokenizer, self._prompts, self._metrics = tokenizer, prompts, tuple(metrics)
        self._rewards: list[tuple[str, float, Reward]] = []
        for name, weight in rewards.items():
            try:
                reward = made(name)
            except ValueError as error:
                raise InputError(f"task.reward: {error}.") from None
            assert reward is not None
            self._rewards.append((name, weight, reward))

    def texts(self, tokens: np.ndarray) -> list[str]:
        """Completions (n, length) int32 as texts, without special tokens, and white space around them."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)]

    def score(self, index: int, text: str) -> tuple[float, bool]:
        """The reward of a completion of a prompt, and whether there is one: it is 0 where a function raises, or gives no finite number."""
        total = 0.0
        for name, weight, reward in self._rewards:
            try:
                value = float(reward(text, self._prompts.inputs[index], self._prompts.references[index]))
                wrong = None if math.isfinite(value) else f"gives {value}"
            except Exception as error:  # the user's function may fail in any way it likes
                value, wrong = 0.0, f"raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            if wrong is not None:
                warn(f"the reward '{name}' {wrong}. The completion counts 0, and train/reward_failures counts it.")
                return 0.0, False
            total += weight * value
        return total, True

    def rewards(self, prompts: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of completions: float32 rewards, and whether each failed.

        Args:
            prompts: (..., n) int32, which prompt each completes.
            tokens: (..., n, length) int32.

        Returns:
            (..., n) float32 and bool.
        """
        prompts, tokens = np.asarray(prompts), np.asarray(tokens)
        texts = self.texts(tokens.reshape(-1, tokens.shape[-1]))
        scored = [self.score(int(index), text) for index, text in zip(prompts.reshape(-1), texts, strict=True)]
        values, there = (np.array(column) for column in zip(*scored, strict=True))
        return values.astype(np.float32).reshape(prompts.shape), ~there.reshape(prompts.shape)

    def __call__(self, answers: Sequence[np.ndarray]) -> dict[str, Any]:
        """The mean reward and the metrics of the first prompts, of their completions (1, length) int32 each: a `Scorer`."""
        texts = self.texts(np.concatenate(list(answers)))
        references = self._prompts.references[: len(texts)]
        found = {REWARD.name: float(np.mean([self.score(i, text)[0] for i, text in enumerate(texts)]))}
        for name in self._metrics:
            from_texts = EVALUATORS.get(name, "task.metrics").from_texts
            assert from_texts is not None
            found[name] = from_texts(texts, references)
        return found
