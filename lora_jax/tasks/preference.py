"""Preferences: which of two responses to a prompt is the better one, or whether a single response is good.

An example is a pair: two texts, each the prompt and one response, in one row of a batch, so that both are in the same micro-batch. The loss
is the mean over pairs. Where the loss needs them, the base's own log-probabilities (the adapter off) are computed once an example before
the first step: there is no second model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from ..config.doors import TASKS
from ..config.types import NonNegativeFloat, PositiveFloat
from ..data.batching import NO_TARGET, Example
from ..data.prompts import Prompts
from ..data.tokens import encode_chat, messages_of, plain_ids, prompt_ids, start_ids, with_start
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.heads import LanguageModel, RewardModel
from .base import Base, Columns, Encoded, Prediction, Rows, Shared, TaskData, TaskMetrics
from .evaluators import Evaluator, register
from .next_token import NEW_TOKENS, DatedConfig, NextToken, next_token, notes_on, with_end
from .objectives import Objective, target_log_probs
from .preference_losses import (
    CHOSEN,
    REFERENCE,
    REJECTED,
    UNRELATED,
    PairLoss,
    dpo,
    ipo,
    kto_objective,
    orpo,
    pair_objective,
    reward_objective,
    simpo,
)

MARGIN = register(Evaluator("margin", True))
CHOSEN_REWARD = register(Evaluator("chosen_reward", True))
REJECTED_REWARD = register(Evaluator("rejected_reward", False))

# Loss -> its own keys, with what they are where they are left out.
_KEYS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "per_token": False},
    "ipo": {"beta": 0.1, "per_token": False},
    "orpo": {"orpo_lambda": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "reward": {},
}
_WITHOUT_REFERENCE = ("orpo", "simpo", "reward")
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")


class PreferenceConfig(DatedConfig):
    kind: Literal["preference"] = Field(default="preference", description="Which of two responses to a prompt is better.")
    prompt: str = Field(description="Prompt column: texts, or chat messages [{role, content}], which go through the chat template.")
    chosen: str | None = Field(default=None, description="Column of the better responses: texts or messages, as the prompts are.")
    rejected: str | None = Field(default=None, description="Column of the worse responses.")
    response: str | None = Field(default=None, description="kto without pairs: response column.")
    label: str | None = Field(default=None, description="kto without pairs: whether the response is desirable, true or false.")
    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto", "reward"] = Field(
        default="dpo",
        description=(
            "dpo (arXiv:2305.18290), ipo (arXiv:2310.12036), orpo (arXiv:2403.07691) and simpo (arXiv:2405.14734) of pairs; kto "
            "(arXiv:2402.01306) of single responses with a label, or of pairs, each of which then is two examples; reward: a head that "
            "scores responses (Bradley-Terry). orpo, simpo and reward need no log-probabilities of the base."
        ),
    )
    beta: PositiveFloat | None = Field(default=None, description="Of dpo, ipo (its tau), kto: default 0.1. Of simpo: default 2.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        default=None, description="Of dpo: the share of preferences taken to be the wrong way round (conservative DPO). Default: 0."
    )
    per_token: bool | None = Field(
        default=None,
        description="Of dpo and ipo: divide a response's log-ratio by its number of tokens, as TRL does for ipo. Default: false.",
    )
    simpo_gamma: Annotated[float, Field(ge=0)] | None = Field(default=None, description="Of simpo: the margin gamma. Default: 1.")
    orpo_lambda: PositiveFloat | None = Field(default=None, description="Of orpo: weight of the odds ratio. Default: 0.1.")
    desirable_weight: PositiveFloat | None = Field(default=None, description="Of kto: weight of desirable responses. Default: 1.")
    undesirable_weight: PositiveFloat | None = Field(default=None, description="Of kto: weight of undesirable responses. Default: 1.")

    disk_gb: NonNegativeFloat = Field(
        default=1.0,
        description="How large the files of the base's log-probabilities may become, in .reference-cache below tracking.dir; 0: none.",
    )

    @model_validator(mode="after")
    def _columns(self) -> PreferenceConfig:
        pair, single = (self.chosen, self.rejected), (self.response, self.label)
        ways = [any(n is not None for n in names) for names in (pair, single)]
        if all(ways) or not any(ways):
            raise ValueError("preference needs 'chosen' and 'rejected', or for kto 'response' and 'label'")
        if None in (pair if ways[0] else single):
            raise ValueError("'chosen' and 'rejected' go together" if ways[0] else "'response' and 'label' go together")
        if ways[1] and self.loss != "kto":
            raise ValueError(f"'response' and 'label' are for kto; {self.loss} needs 'chosen' and 'rejected'")
        names = self.column_names
        if len(set(names)) < len(names):
            raise ValueError(f"a column is named twice: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_loss(self) -> PreferenceConfig:
        for key in dict.fromkeys(key for keys in _KEYS.values() for key in keys):
            if getattr(self, key) is not None and key not in _KEYS[self.loss]:
                raise ValueError(f"'{key}' belongs to {' and '.join(loss for loss, keys in _KEYS.items() if key in keys)}, not {self.loss}")
        return self

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns that are read: prompt, chosen and rejected; or prompt, response and label."""
        return tuple(n for n in (self.prompt, self.chosen, self.rejected, self.response, self.label) if n is not None)

    @property
    def options(self) -> dict[str, Any]:
        """The keys of the loss, each with its default where it is left out."""
        return {key: default if (given := getattr(self, key)) is None else given for key, default in _KEYS[self.loss].items()}


class Preference(NextToken):
    """Preferences between responses."""

    name, section = "preference", PreferenceConfig
    loss_keys = frozenset(key for keys in _KEYS.values() for key in keys)

    def columns(self, section: PreferenceConfig) -> Columns:
        """Prompts and responses; rows with one prompt stay on one side of the split."""
        names = section.column_names
        structured = names[:2] if section.label is not None else names
        return Columns(names, targets=names[1:], structured=structured, nonempty=names)

    def read(self, section: PreferenceConfig, rows: Rows, key: str) -> Rows:
        """Every row, checked."""
        for values, number in zip(zip(*(rows.columns[n] for n in section.column_names), strict=True), rows.numbers, strict=True):
            _check_row(section, values, f"{key}: row {number} of {rows.source}")
        texts = [isinstance(prompt, str) for prompt in rows.columns[section.prompt]]
        if len(set(texts)) > 1:
            other = int(rows.numbers[texts.index(not texts[0])])
            kinds = ("a text", "a list of messages") if texts[0] else ("a list of messages", "a text")
            raise InputError(
                f"{key}: '{section.prompt}' of {rows.source} is {kinds[0]} in row {rows.numbers[0]} and {kinds[1]} in row {other}."
            )
        return rows

    def metrics(self, section: PreferenceConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """How often the chosen response has the larger reward, and by how much. Steps are chosen by the loss, which has no ties."""
        # Of single responses there are no pairs to have a margin.
        rewards = ("chosen_reward", "rejected_reward") if section.loss == "kto" else ("margin", "chosen_reward", "rejected_reward")
        kl = () if section.loss in _WITHOUT_REFERENCE else ("kl",)
        return TaskMetrics(("loss", "accuracy", *rewards, *kl), "loss", "accuracy", training=("accuracy",))

    def loss(self, section: PreferenceConfig) -> Objective:
        """The loss that the section names, with its numbers."""
        options = section.options
        if section.loss == "reward":
            return reward_objective
        if section.loss == "kto":
            return functools.partial(kto_objective, **options)
        return functools.partial(pair_objective, _pair_loss(section.loss, options))

    def predicts_next(self, section: PreferenceConfig) -> bool:
        """Unless a head scores whole responses."""
        return section.loss != "reward"

    def notes(self, section: PreferenceConfig, tokenizer: Any) -> list[str]:
        """The numbers of the loss that are left to their defaults; what a language model says of the tokenizer."""
        said = [f"{key} = {section.options[key]:g}" for key in _KEYS[section.loss] if getattr(section, key) is None]
        head = [f"{section.loss}: defaults {', '.join(said)}."] if said else []
        chats = notes_on(tokenizer, section.date, "task.prompt") if isinstance(tokenizer.chat_template, str) else []
        return [*head, *notes_on(tokenizer, section.date, None), *chats]

    def check_base(self, section: PreferenceConfig, base: Base, source: str) -> None:
        """It needs a decoder."""
        if not isinstance(base, Decoder):
            raise InputError(f"task.kind: {self.name} needs a decoder, which {source} is not.")

    def model(
        self, section: PreferenceConfig, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None
    ) -> nnx.Module:
        """The decoder with its own readout, or with a head of one output."""
        assert isinstance(base, Decoder)
        return RewardModel(base, rngs=nnx.Rngs(0)) if section.loss == "reward" else LanguageModel(base)

    def shared(self, section: PreferenceConfig, base: Base, load: Callable[..., Any], data: TaskData) -> Shared | None:
        """The base's own log-probability of each target, where the loss needs them."""
        if section.loss in _WITHOUT_REFERENCE:
            return None
        assert isinstance(base, Decoder)
        return Shared(REFERENCE, LanguageModel(base), _reference, once=True, disk_gb=section.disk_gb)

    def stand_in(self, section: PreferenceConfig, column: str, row: Mapping[str, Any], classes: tuple[str, ...] | None) -> Any:
        """Any response, of the prompt's kind; a reward head has to have real ones."""
        if section.loss == "reward":
            raise InputError(f"--source: needs the column '{column}', whose responses are scored.")
        if column == section.label:
            return "true"
        return column if isinstance(row[section.prompt], str) else [{"role": "assistant", "content": column}]

    def prompts(self, section: PreferenceConfig, rows: Rows, tokenizer: Any) -> Prompts | None:
        """What a language model answers, beside the chosen response; a reward head writes nothing."""
        if section.loss == "reward":
            return None
        tokens, inputs = [], []
        for prompt, n in zip(rows.columns[section.prompt], rows.numbers, strict=True):
            asked = prompt if isinstance(prompt, str) else _messages(prompt, f"task.prompt: row {n}")
            tokens.append(np.array(prompt_ids(asked, tokenizer, f"task.prompt: row {n}", section.date), np.int32))
            inputs.append(asked if isinstance(asked, str) else "\n".join(f"{m['role']}: {m['content']}" for m in asked))
        answers = [value if isinstance(value, str) else value[-1]["content"] for value in rows.columns[section.column_names[1]]]
        good = [True] * len(rows) if section.label is None else [_label(value, "") for value in rows.columns[section.label]]
        return Prompts(tokens, inputs, [(answer,) if right else () for answer, right in zip(answers, good, strict=True)], NEW_TOKENS)

    def predictions(
        self,
        section: PreferenceConfig,
        rows: Rows,
        encoded: Encoded,
        answers: Sequence[np.ndarray | None],
        classes: tuple[str, ...] | None,
    ) -> list[Prediction]:
        """The scores of a reward head, and whether the chosen response has the larger one."""
        made = []
        for prompt, scores in zip(rows.columns[section.prompt], answers, strict=True):
            named = None if scores is None else {"chosen": float(scores[0]), "rejected": float(scores[1])}
            made.append(Prediction(prompt, named, "chosen", None if scores is None else float(scores[0] > scores[1])))
        return made

    def encode(self, section: PreferenceConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """Each row's pair; each response of kto, with another row's for its baseline. A pair of which `max_length` leaves nothing, or
        nothing that differs, is left out."""
        prompts = rows.columns[section.prompt]
        numbers = [int(n) for n in rows.numbers]
        texts = _Texts(tokenizer, section)
        if section.loss != "kto":
            sides = [texts.of(prompts, rows.columns[str(name)], numbers) for name in (section.chosen, section.rejected)]
            if section.loss == "reward":
                sides = [[_at_the_end(e) for e in side] for side in sides]
            pairs = [_joined([(chosen, CHOSEN), (rejected, REJECTED)]) for chosen, rejected in zip(*sides, strict=True)]
            made = [_without_targets(e) if _alike(e) else e for e in pairs]
            alike = sum(_alike(e) for e in pairs)
            said = f"{alike} pairs left out (their responses differ only beyond task.max_length = {section.max_length} tokens)"
            return Encoded(made, notes=(said,) if alike else ())
        if section.label is not None:
            answers = rows.columns[str(section.response)]
            roles = [CHOSEN if _label(value, "") else REJECTED for value in rows.columns[section.label]]
            sides = [(answers, roles)]
        else:
            sides = [
                (rows.columns[str(section.chosen)], [CHOSEN] * len(rows)),
                (rows.columns[str(section.rejected)], [REJECTED] * len(rows)),
            ]
        made = []
        for answers, roles in sides:
            own, other = texts.of(prompts, answers, numbers), texts.of(prompts, [*answers[1:], *answers[:1]], numbers)
            made += [_joined([(a, role), (b, UNRELATED)]) for a, role, b in zip(own, roles, other, strict=True)]
        return Encoded(made)


TASKS.register("preference", Preference())


def _pair_loss(name: str, options: Mapping[str, Any]) -> PairLoss:
    """The loss of pairs and the rewards, as functions of what is known of the responses."""
    if name == "orpo":
        return lambda r: (orpo(r.mean[:, CHOSEN], r.mean[:, REJECTED], weight=options["orpo_lambda"]), r.mean)
    beta = options["beta"]
    if name == "simpo":
        return lambda r: (simpo(r.mean[:, CHOSEN], r.mean[:, REJECTED], beta=beta, gamma=options["simpo_gamma"]), beta * r.mean)

    def loss(r: Any) -> tuple[jax.Array, jax.Array]:
        ratio = r.mean_ratio if options["per_token"] else r.ratio
        chosen, rejected = ratio[:, CHOSEN], ratio[:, REJECTED]
        if name == "ipo":
            return ipo(chosen, rejected, beta=beta), beta * ratio
        return dpo(chosen, rejected, beta=beta, label_smoothing=options["label_smoothing"]), beta * ratio

    return loss


def _reference(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return target_log_probs(model.readout(), model.features(batch), batch["target_ids"])


class _Texts:
    """Makes examples of prompts and responses.

    Args:
        tokenizer: a transformers fast tokenizer.
        section: the config section.
    """

    def __init__(self, tokenizer: Any, section: PreferenceConfig):
        self._tokenizer, self._section = tokenizer, section
        self._start = start_ids(tokenizer)

    def of(self, prompts: Sequence[Any], answers: Sequence[Any], numbers: Sequence[int]) -> list[Example]:
        """One for each prompt and response: the loss is on the response. The numbers are the rows', for messages."""
        texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        before, after = (plain_ids(self._tokenizer, [column[i] for i in texts]) if texts else [] for column in (prompts, answers))
        made: dict[int, Example] = {}
        for i, prompt, answer in zip(texts, before, after, strict=True):
            head, tail = with_start(prompt, self._start), with_end(answer, answers[i], self._tokenizer)
            made[i] = next_token([*head, *tail], [False] * len(head) + [True] * len(tail), self._section.max_length)
        for i, prompt in enumerate(prompts):
            if i not in made:
                asked, said = _messages(prompt, ""), _messages(answers[i], "")
                options = {"key": "task.prompt", "after": len(asked)}
                chat = encode_chat([*asked, *said], self._tokenizer, numbers[i], self._section.date, **options)
                made[i] = next_token(chat.ids, chat.wanted, self._section.max_length)
        return [made[i] for i in range(len(prompts))]


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation: a list of messages, or a single one."""
    return messages_of([value] if isinstance(value, dict) else value, where)


def _check_row(section: PreferenceConfig, values: Sequence[Any], where: str) -> None:
    """`InputError` unless a row has a prompt, and responses that differ, are not empty, and are what the prompt is: texts or messages."""
    prompt, *others = values
    names = section.column_names[1:]
    if section.label is not None:
        _label(others.pop(), f"{where}: '{section.label}'")
        names = names[:1]
    said = []
    for name, value in zip(names, others, strict=True):
        if isinstance(value, str) != isinstance(prompt, str):
            kinds = ["a text" if isinstance(v, str) else "a list of messages" for v in (prompt, value)]
            raise InputError(f"{where}: '{section.prompt}' is {kinds[0]}, and '{name}' {kinds[1]}; both must be of one kind.")
        if isinstance(value, str):
            said.append(value)
            empty = not value.strip()
        else:
            _messages(prompt, f"{where}: '{section.prompt}'")
            messages = _messages(value, f"{where}: '{name}'")
            if messages[-1]["role"] != "assistant":
                raise InputError(f"{where}: '{name}' ends with a message of '{messages[-1]['role']}', not of the assistant.")
            said.append([(m["role"], m["content"]) for m in messages])
            empty = not messages[-1]["content"].strip()
        if empty:
            raise InputError(f"{where}: '{name}' is empty.")
    if len(said) == 2 and said[0] == said[1]:
        raise InputError(f"{where}: '{names[0]}' and '{names[1]}' are equal; a pair without a difference teaches nothing.")


def _label(value: Any, where: str) -> bool:
    text = str(value).strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise InputError(f"{where} is {value!r}; it must be true or false (or 1 or 0).")
    return text in _TRUE


def _joined(parts: Sequence[tuple[Example, int]]) -> Example:
    """Texts and their roles as one example; without targets where one of them has none."""
    lengths = [len(e.tokens) for e, _ in parts]
    starts = np.cumsum([0, *lengths[:-1]])
    found = Example(
        np.concatenate([e.tokens for e, _ in parts]),
        np.concatenate([e.targets for e, _ in parts]),
        parts=np.array(list(zip(starts, (role for _, role in parts), strict=True)), np.int32),
        cut=any(e.cut for e, _ in parts),
        end_cut=any(e.end_cut for e, _ in parts),
    )
    return found if all((e.targets != NO_TARGET).any() for e, _ in parts) else _without_targets(found)


def _without_targets(example: Example) -> Example:
    return Example(example.tokens, np.full_like(example.targets, NO_TARGET), parts=example.parts, cut=example.cut, end_cut=example.end_cut)


def _at_the_end(example: Example) -> Example:
    """With one target, at the last token; its id (0) says nothing."""
    targets = np.full_like(example.targets, NO_TARGET)
    targets[-1:] = 0 if (example.targets != NO_TARGET).any() else NO_TARGET
    return Example(example.tokens, targets, cut=example.cut, end_cut=example.end_cut)


def _alike(example: Example) -> bool:
    """Whether the two texts of a pair that has targets are equal."""
    assert example.parts is not None
    at = int(example.parts[1, 0])
    return bool((example.targets != NO_TARGET).any()) and np.array_equal(example.tokens[:at], example.tokens[at:])
