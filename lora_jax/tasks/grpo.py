"""Group relative policy optimization (GRPO, arXiv:2402.03300): a language model learns of rewards for what it writes itself.

A training step samples `completions` of each prompt of the batch with each member's own model, asks the reward functions for their
rewards (Python on the host, called from the compiled step), and makes `update_epochs` x `minibatches` optimizer steps on them.
Members have completions of their own; what they draw follows from their seeds. The model that the divergence is measured from is the same
base with the adapter off: there is no second model.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator, model_validator

from ..config.doors import TASKS
from ..config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from ..data.batching import NO_TARGET, Example
from ..data.episodes import PromptRows
from ..data.prompts import Prompts
from ..errors import InputError
from ..models.decoder import Decoder
from ..parallel.constraints import by_rows
from .base import Base, Columns, Encoded, Prediction, Rows, TaskData, TaskMetrics, one_or_all
from .generated import METRICS, Generated, GeneratedConfig, Names
from .objectives import target_log_probs
from .on_policy import Completer, Minibatches, OnPolicy, Tree, clipped_surrogate
from .preference_losses import drift
from .rewards import REWARD, Judge, asks_for_references, made, weights_of

# Beside the standard deviation of a group's rewards, by which they are divided.
_EPSILON = 1e-4


class GRPOConfig(GeneratedConfig):
    kind: Literal["grpo"] = Field(default="grpo", description="A language model learns of rewards for what it writes (arXiv:2402.03300).")
    prompt: str = Field(description="Column of the prompts.")
    response: Names | None = Field(
        default=None, description="Column or columns of references (a text each, or a list), for rewards and metrics that need them."
    )
    reward: str | list[str] | dict[str, float] = Field(
        description=(
            "A reward, several, or several with weights. Built-in, with references: exact, normalised, number (the last one, as in GSM8K), "
            "token_f1; without: contains:WORD, regex:PATTERN, length:WORDS, format (<think> and <answer>). Or a function of yours, "
            "package.module:function, called as function(completion, prompt, references)."
        )
    )
    completions: int = Field(default=8, ge=2, description="Completions of each prompt (a group) in a training step.")
    sampling_temperature: PositiveFloat = Field(default=1.0, description="Temperature at which completions are sampled in training.")
    beta: NonNegativeFloat = Field(default=0.04, description="Coefficient of the divergence from the base; 0 does not compute it.")
    clip: PositiveFloat = Field(default=0.2, description="Epsilon of the clipped objective: ratios count from 1 - clip to 1 + clip.")
    clip_high: PositiveFloat | None = Field(default=None, description="The upper epsilon, where it is another (DAPO, arXiv:2503.14476).")
    loss: Literal["grpo", "dr_grpo", "dapo"] = Field(
        default="grpo",
        description=(
            "What tokens are averaged over: each completion's own, then completions (grpo); all of the update's (dapo, arXiv:2503.14476); "
            "as many as there could be, max_new_tokens each (dr_grpo, arXiv:2503.20783)."
        ),
    )
    divide_by_std: bool | None = Field(
        default=None, description="Divide a group's advantages by the standard deviation of its rewards. Default: all but dr_grpo do."
    )
    leave_out_equal: bool = Field(
        default=False,
        description="Leave groups whose rewards are all equal out of the loss. (DAPO samples others in their place; here none are.)",
    )
    update_epochs: PositiveInt = Field(default=1, description="Passes over the completions in a training step.")
    minibatches: PositiveInt = Field(default=1, description="Optimizer steps of a pass; must divide training.batch_size * completions.")
    metrics: list[str] = Field(default_factory=list, description=f"Beside the reward, by which members are compared. {METRICS}")

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[str]) -> list[str]:
        return super()._metrics(value) if value else value

    @field_validator("reward")
    @classmethod
    def _rewards(cls, value: Any) -> Any:
        weights = weights_of(value)
        if not weights or (isinstance(value, list) and len(weights) < len(value)):
            raise ValueError("names a reward twice" if weights else "names no reward")
        for name, weight in weights.items():
            made(name, imported=False)
            if not np.isfinite(weight) or not weight:
                raise ValueError(f"the weight of '{name}' is {weight:g}: leave it out")
        return value

    @model_validator(mode="after")
    def _references(self) -> GRPOConfig:
        name = asks_for_references(self.reward)
        if self.response is None and (name is not None or self.metrics):
            raise ValueError(f"'{name or self.metrics[0]}' needs 'response', the column of what is right")
        return self

    @property
    def divides(self) -> bool:
        """Whether advantages are divided by the group's standard deviation."""
        return self.loss != "dr_grpo" if self.divide_by_std is None else self.divide_by_std


def group_advantages(rewards: jax.Array, *, divide: bool) -> jax.Array:
    """Of groups of completions: their rewards without the group's mean, over its standard deviation (arXiv:2402.03300, section 4.1.2).

    Args:
        rewards: (groups, completions) float32.
        divide: False leaves the difference as it is (arXiv:2503.20783, eq. 3).

    Returns:
        (groups, completions) float32. The deviation is that of a sample (n - 1), and 1e-4 more, as in TRL; equal rewards give zeros.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, keepdims=True, ddof=1) + _EPSILON) if divide else centred


def grpo_loss(
    log_probs: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    *,
    clip: float,
    clip_high: float | None,
    beta: float,
    kind: str,
) -> jax.Array:
    """What is to shrink: the negative of eq. 3 of arXiv:2402.03300, with the divergence of its eq. 4.

    Args:
        log_probs, old, reference: (completions, length) float32, of each token: of the policy, of the one that sampled it, and of the
            base; the last None where `beta` is 0.
        advantages: (completions,).
        weights: (completions, length), 1 of the tokens of completions that count, else 0.
        kind: what the mean is over: `grpo` (that equation), `dapo` (arXiv:2503.14476, eq. 8), `dr_grpo` (arXiv:2503.20783, with a
            constant in place of each completion's length).
    """
    gain = clipped_surrogate(jnp.exp(log_probs - old), advantages[:, None], clip, clip_high)
    if reference is not None:
        gain = gain - beta * drift(log_probs - reference)
    gain, lengths = jnp.where(weights > 0, gain, 0.0), weights.sum(1)
    counted = jnp.maximum((lengths > 0).sum(), 1)
    if kind == "grpo":
        return -jnp.sum(gain.sum(1) / jnp.maximum(lengths, 1.0)) / counted
    return -gain.sum() / (jnp.maximum(lengths.sum(), 1.0) if kind == "dapo" else counted * gain.shape[1])


class Groups(OnPolicy):
    """How a member samples, is rewarded and learns.

    Args:
        section: the config section.
        judge: rewards completions of the training prompts; None where only `updates` is asked for.
        complete: writes completions; None as `judge`.
    """

    def __init__(self, section: GRPOConfig, judge: Judge | None, complete: Completer | None):
        self._section, self._judge, self._write = section, judge, complete
        self._minibatches = Minibatches(section.update_epochs, section.minibatches)
        self.updates, self.needs_base = self._minibatches.updates, section.beta > 0

    def begin(self, key: jax.Array) -> Tree:
        """Nothing: each step begins with prompts."""
        return ()

    def collect(self, model: Any, kept: Tree, batch: dict[str, jax.Array], key: jax.Array, base: Callable[[], Any]) -> tuple[Tree, Tree]:
        """Completions with their advantages and log-probabilities, arrays (prompts * completions, ...), and which each update learns of."""
        section, judge = self._section, self._judge
        assert judge is not None
        # On a mesh each device has its own rows, of all that is computed of completions.
        columns = (batch[name][0] for name in ("tokens", "segment_ids", "prompts"))
        tokens, mask, prompts = (by_rows(jnp.repeat(column, section.completions, axis=0)) for column in columns)
        seeds = jax.random.bits(jax.random.fold_in(key, 1), prompts.shape, jnp.uint32)
        new, real = self._complete(model, tokens, mask, seeds, section.sampling_temperature, None)
        shapes = jax.ShapeDtypeStruct(prompts.shape, jnp.float32), jax.ShapeDtypeStruct(prompts.shape, bool)
        rewards, failed = jax.pure_callback(judge.rewards, shapes, prompts, new, vmap_method="broadcast_all")
        groups = rewards.reshape(-1, section.completions)
        seen = {"tokens": jnp.concatenate([tokens, new], 1), "mask": jnp.concatenate([mask, real.astype(mask.dtype)], 1)}
        found = seen | {"old": self._log_probs(model, seen), "weights": real.astype(jnp.float32)}
        if section.beta:
            found["reference"] = self._log_probs(base(), seen)
        if section.leave_out_equal:
            spread = (groups.max(1) > groups.min(1)).repeat(section.completions)
            found["weights"] = found["weights"] * spread[:, None]
        found["advantages"] = group_advantages(groups, divide=section.divides).reshape(-1)
        lengths = real.sum(1)
        figures = {
            "reward": rewards.mean(),
            "reward_std": groups.std(1, ddof=1).mean(),
            "completion_tokens": lengths.mean(dtype=jnp.float32),
            "reward_failures": failed.sum(dtype=jnp.float32),
        }
        if section.beta:
            moved = jnp.where(real, drift(found["old"] - found["reference"]), 0.0)
            figures["kl"] = moved.sum() / lengths.sum()
        chosen = self._minibatches.draw(len(prompts), jax.random.fold_in(key, 2))
        return kept, (jax.lax.stop_gradient(found), chosen, figures)

    def figures(self, collected: Tree) -> dict[str, jax.Array]:
        """Means of the rewards, of their deviation within a group and of the lengths; the divergence; how many rewards failed."""
        return collected[2]

    def part(self, collected: Tree, index: jax.Array) -> Tree:
        """A minibatch."""
        found, chosen, _ = collected
        return jax.tree.map(lambda a: by_rows(a[chosen[index]]), found)

    def loss(self, model: Any, part: Tree) -> jax.Array:
        """`grpo_loss` of a minibatch."""
        section = self._section
        of_tokens = functools.partial(grpo_loss, clip=section.clip, clip_high=section.clip_high, beta=section.beta, kind=section.loss)
        return of_tokens(self._log_probs(model, part), part["old"], part.get("reference"), part["advantages"], part["weights"])

    def evaluate(self, model: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """(rows, max_new_tokens) int32: a completion of each prompt, as `temperature` and `top_p` choose it."""
        section = self._section
        seeds = jnp.uint32(section.split_seed % 2**32) + batch["prompts"].astype(jnp.uint32)
        return self._complete(model, batch["tokens"], batch["segment_ids"], seeds, section.temperature, section.top_p)[0]

    def _complete(
        self, model: Any, tokens: jax.Array, mask: jax.Array, seeds: jax.Array, temperature: float, top_p: float | None
    ) -> tuple[jax.Array, jax.Array]:
        """(rows, max_new_tokens): the tokens that follow, int32, and which of them belong to the completion: up to the one that ends it."""
        assert self._judge is not None and self._write is not None
        tokenizer, room = self._judge.tokenizer, self._section.max_new_tokens
        new, real = self._write(model.base, tokens, mask, seeds, tokenizer, temperature=temperature, top_p=top_p, room=room)
        return by_rows(new), by_rows(real)

    def _log_probs(self, model: Any, seen: Tree) -> jax.Array:
        """(rows, max_new_tokens) float32: of each token of the completions, at the temperature that they were sampled at."""
        tokens, mask = seen["tokens"], seen["mask"]
        (rows, length), room = tokens.shape, self._section.max_new_tokens
        first = length - room - 1  # of a row: the last token of its prompt
        index = jnp.arange(rows)[:, None] * length + jnp.arange(first, length - 1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden = model.base.hidden(tokens, positions=positions, segment_ids=mask, gather=index.reshape(-1))
        readout, temperature = model.readout(), self._section.sampling_temperature
        found = target_log_probs(lambda x: readout(x).astype(jnp.float32) / temperature, hidden, tokens[:, first + 1 :].reshape(-1))
        return found.reshape(rows, room)


class GRPO(Generated):
    """What is learned of rewards for what the model itself writes."""

    name, section = "grpo", GRPOConfig
    targets = 1
    next_token = False

    def named(self, section: GRPOConfig) -> tuple[str, Names]:
        """`prompt` and `response`."""
        return section.prompt, [] if section.response is None else section.response

    def template(self, section: GRPOConfig) -> str:
        """The prompt as it is."""
        return "{text}"

    def columns(self, section: GRPOConfig) -> Columns:
        """The prompts, and references where there are any."""
        return Columns((section.prompt,), nonempty=(section.prompt,)) if section.response is None else super().columns(section)

    def check_base(self, section: GRPOConfig, base: Base, source: str) -> None:
        """It needs a decoder, without dropout of its own, whose cache holds for rows of any length."""
        if not isinstance(base, Decoder):
            raise InputError(f"task.kind: {self.name} needs a decoder, which {source} is not.")
        if base.dropout:
            raise InputError(f"model.dropout: not with task.kind '{self.name}': one model must sample and learn.")
        if any(border < section.max_length for border in base.borders):
            raise InputError(f"task.max_length: {section.max_length}, and {source} changes its rotary frequencies at {min(base.borders)}.")

    def encode(self, section: GRPOConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """Each row's prompt. Its one target, at the last token, is a checksum of the references: other ones are other data."""
        prompts = self.prompts(section, rows, tokenizer)
        made = []
        for row, (tokens, references) in enumerate(zip(prompts.tokens, prompts.references, strict=True)):
            if not len(tokens):
                raise InputError(f"task.prompt: row {rows.numbers[row]} of {rows.source} has no tokens.")
            targets = np.full(len(tokens), NO_TARGET, np.int32)
            targets[-1] = zlib.crc32("\x1f".join(references).encode()) >> 1
            made.append(Example(tokens, targets))
        judge = Judge(weights_of(section.reward), tokenizer, prompts, section.metrics)
        return Encoded(made, scorer=lambda kept: judge)

    def collected(self, section: GRPOConfig) -> PromptRows:
        """Prompts with their completions."""
        some = 10**9 if section.decoded_rows == "all" else section.decoded_rows
        said = f"{section.completions} completions of each prompt, up to {section.max_new_tokens} tokens, for each member"
        return PromptRows(section.completions, section.minibatches, section.max_new_tokens, some, said)

    def decoded_rows(self, section: GRPOConfig) -> int:
        """None: evaluation samples as training does."""
        return 0

    def notes(self, section: GRPOConfig, tokenizer: Any) -> list[str]:
        """What a run says of the tokenizer, as of other texts."""
        return super().notes(section, tokenizer)[1:]

    def metrics(self, section: GRPOConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The mean reward, and those of `task.metrics`."""
        return TaskMetrics((REWARD.name, *section.metrics), REWARD.name)

    def on_policy(self, section: GRPOConfig, data: TaskData | None = None, complete: Completer | None = None) -> OnPolicy:
        """Groups of completions."""
        judge: Any = None if data is None else data.train.score
        return Groups(section, judge, complete)

    def judged(self, section: GRPOConfig, prompts: Prompts, texts: Sequence[str]) -> list[Prediction]:
        """The texts with their rewards."""
        judge, made = Judge(weights_of(section.reward), None, prompts), []
        scored = asks_for_references(section.reward) is None
        for i, (asked, text, right) in enumerate(zip(prompts.inputs, texts, prompts.references, strict=True)):
            made.append(Prediction(asked, text, one_or_all(right), judge.score(i, text)[0] if right or scored else None))
        return made


TASKS.register("grpo", GRPO())
