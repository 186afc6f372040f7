"""What tasks share whose output is a text: a template makes the prompt, the model learns the target, and is scored by what it generates.

A row may have several references: one column of lists, or several columns. Each is an example to learn; a generated text is scored by
all of them. Where a source has only some of the columns (one summary a row to train on, three to test with), a row's references are
those that it has. A text is cut so that template and text leave `max_new_tokens` of `max_length` tokens free: the prompts that are
decoded are those that were learned.

An encoder-decoder reads the text by itself, unless the config names a template (T5's prefix, `summarize: {text}`), and writes the target.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from ..config.types import NonNegativeFloat, PositiveInt, Steps
from ..data.batching import Example
from ..data.files import as_text
from ..data.pairs import Shift, source_target, target_ids
from ..data.prompts import Prompts, shortened
from ..data.tokens import encode_chat, encoder_texts, plain_ids, prompt_ids, start_ids, template_of, with_start, writes_date
from ..errors import InputError, hint
from .base import Columns, Encoded, Rows, TaskMetrics
from .evaluators import EVALUATORS
from .next_token import DatedConfig, NextToken, next_token, with_end

# References may stand in one column or several.
Names = str | list[str]


METRICS = (
    "Metrics of the generated texts; members are compared by the first. rouge1, rouge2, rougeL, rougeLsum, bleu, chrf, exact, "
    "normalised (after SQuAD's clean-up), number (the last one, as in GSM8K), token_f1."
)


class GeneratedConfig(DatedConfig):
    """The section of a task whose output is a text."""

    template: str | None = Field(default=None, description="The prompt around {text}. Default: the kind's own.")
    chat: bool = Field(default=False, description="Put the prompt through the model's chat template, as what the user says.")
    system: str | None = Field(default=None, description="With chat: the system message.")
    max_length: Steps = Field(
        default=512, description="Maximal number of tokens of an example. Texts are cut to leave max_new_tokens of them for the target."
    )
    max_new_tokens: PositiveInt = Field(default=64, description="Maximal number of tokens that are generated.")
    decoded_rows: PositiveInt | Literal["all"] = Field(
        default=100, description="How many of the held-out rows (and of the test rows) are decoded at each evaluation."
    )
    temperature: NonNegativeFloat = Field(default=0.0, description="Sampling temperature; 0 decodes greedily. Seeds: split_seed + row.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="With a temperature: sample from the likeliest tokens of this total probability.",
    )
    metrics: list[str] = Field(description=METRICS)

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[str]) -> list[str]:
        known = [name for name, evaluator in EVALUATORS.all().items() if evaluator.from_texts is not None]
        if wrong := [name for name in value if name not in known]:
            raise ValueError(f"there is no metric of texts '{wrong[0]}'. {hint(wrong[0], known)}".rstrip(". "))
        if not value or len(set(value)) < len(value):
            raise ValueError("names a metric twice" if value else "names no metric")
        return value

    @model_validator(mode="after")
    def _prompt(self) -> GeneratedConfig:
        if self.template is not None and "{text}" not in self.template:
            raise ValueError("'template' must contain {text}")
        if self.system is not None and not self.chat:
            raise ValueError("'system' needs 'chat: true'")
        if self.top_p is not None and not self.temperature:
            raise ValueError("'top_p' needs a 'temperature' above 0")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"'max_new_tokens' ({self.max_new_tokens}) must be below 'max_length' ({self.max_length}), which holds both")
        return self


class Generated(NextToken):
    """A text made of a text."""

    @abstractmethod
    def named(self, section: Any) -> tuple[str, Names]:
        """The column of texts, and the column or columns of what is to be generated."""

    @abstractmethod
    def template(self, section: Any) -> str:
        """The prompt around {text}, where the config names none."""

    def filled(self, section: Any, template: str) -> str:
        """The template with all filled in but {text}; as it is by default."""
        return template

    def columns(self, section: GeneratedConfig) -> Columns:
        """The text and its references.

        Raises:
            InputError: a column is named twice, or none for the references.
        """
        text, targets = self._columns(section)
        if not targets or len({text, *targets}) <= len(targets):
            said = "names no column of references" if not targets else f"names a column twice: {', '.join((text, *targets))}"
            raise InputError(f"task: {said}.")
        return Columns((text, *targets), targets=targets, structured=targets, nonempty=(text, *targets), any_of=targets)

    def _columns(self, section: GeneratedConfig) -> tuple[str, tuple[str, ...]]:
        text, targets = self.named(section)
        return text, (targets,) if isinstance(targets, str) else tuple(targets)

    def read(self, section: GeneratedConfig, rows: Rows, key: str) -> Rows:
        """The first column of references holds all those of a row, a tuple of texts; none where the source has no such column.

        Raises:
            InputError: a text is blank; a row has no reference, or one that is blank or no text.
        """
        text, targets = self._columns(section)
        there = [name for name in targets if name in rows.columns]
        where = [f"{key}: row {number} of {rows.source}" for number in rows.numbers]
        for at, value in zip(where, rows.columns[text], strict=True):
            if not value.strip():
                raise InputError(f"{at}: '{text}' is blank.")
        if not targets:
            return rows
        found = [references_of({name: rows.columns[name][i] for name in there}, at) for i, at in enumerate(where)]
        return dataclasses.replace(rows, columns={text: rows.columns[text], targets[0]: found})

    def decoded_rows(self, section: GeneratedConfig) -> int:
        """As many as `task.decoded_rows` says."""
        return 10**9 if section.decoded_rows == "all" else section.decoded_rows

    def metrics(self, section: GeneratedConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The loss of a token, and those of `task.metrics`."""
        return TaskMetrics(("loss", "perplexity", *section.metrics), section.metrics[0], training=("perplexity",))

    def notes(self, section: GeneratedConfig, tokenizer: Any) -> list[str]:
        """What evaluation costs; a tokenizer without an end; the date that a chat template writes."""
        some = "all held-out rows" if section.decoded_rows == "all" else f"at most {section.decoded_rows:,} held-out rows"
        said = [f"each evaluation decodes {some}, up to {section.max_new_tokens} tokens each; plans count neither its time nor its memory."]
        if section.chat and writes_date(template_of(tokenizer, _NO_TEMPLATE)):
            said.append(f"the chat template writes a date: task.date = {section.date}, not today's.")
        elif not section.chat and tokenizer.eos_token_id is None:
            said.append("the tokenizer has no EOS token: the model does not learn where a text ends.")
        return said

    def encode(self, section: GeneratedConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """An example for each reference, with the loss on it."""
        column, targets = self._columns(section)
        prompt = self._prompt(section, tokenizer)
        texts, cut = shortened(rows.columns[column], tokenizer, prompt.room)
        pairs = [(i, reference) for i, references in enumerate(rows.columns[targets[0]]) for reference in references]
        asked = [texts[i] for i, _ in pairs]
        made = prompt.examples(asked, [reference for _, reference in pairs], [int(rows.numbers[i]) for i, _ in pairs])
        return Encoded([dataclasses.replace(e, cut=e.cut or cut[i]) for e, (i, _) in zip(made, pairs, strict=True)])

    def prompts(self, section: GeneratedConfig, rows: Rows, tokenizer: Any) -> Prompts:
        """Each row's prompt."""
        column, targets = self._columns(section)
        prompt, texts = self._prompt(section, tokenizer), rows.columns[column]
        kept, _ = shortened(texts, tokenizer, prompt.room)
        tokens = [np.array(ids, np.int32) for ids in prompt.ids(kept, rows.numbers.tolist())]
        return Prompts(tokens, list(texts), _references(rows, targets), section.max_new_tokens, **_chosen(section))

    def encode_pairs(self, section: GeneratedConfig, rows: Rows, tokenizer: Any, *, shift: Shift) -> Encoded:
        """An example for each reference, which the decoder is to write."""
        column, targets = self._columns(section)
        read = self._sources(section, rows.columns[column], tokenizer)
        pairs = [(i, reference) for i, references in enumerate(rows.columns[targets[0]]) for reference in references]
        told = target_ids(tokenizer, [reference for _, reference in pairs])
        found = ((*read[i], target) for (i, _), target in zip(pairs, told, strict=True))
        return Encoded([source_target(ids, target, shift, section.max_length, cut=cut) for ids, cut, target in found])

    def source_prompts(self, section: GeneratedConfig, rows: Rows, tokenizer: Any) -> Prompts:
        """Each row's text."""
        column, targets = self._columns(section)
        texts = rows.columns[column]
        tokens = [np.array(ids, np.int32) for ids, _ in self._sources(section, texts, tokenizer)]
        return Prompts(tokens, list(texts), _references(rows, targets), section.max_new_tokens, **_chosen(section))

    def _sources(self, section: GeneratedConfig, texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], bool]]:
        """What an encoder-decoder reads of each text, and whether that was cut."""
        if section.chat:
            raise InputError("task.chat: an encoder-decoder has no chats.")
        template = self.filled(section, section.template or "{text}")
        around = len(encoder_texts(tokenizer, [template.replace("{text}", "")], 2**31 - 1)[0][0])
        if around >= section.max_length:
            raise InputError(f"task.max_length: {section.max_length} leaves no room for text beside the template's {around} tokens.")
        kept, cut = shortened(texts, tokenizer, section.max_length - around)
        encoded = encoder_texts(tokenizer, [template.replace("{text}", text) for text in kept], section.max_length)
        return [(ids, short or own) for (ids, short), own in zip(encoded, cut, strict=True)]

    def scored(self, section: GeneratedConfig, text: str, references: Sequence[str]) -> float:
        """By the first metric, of this row alone."""
        from_texts = EVALUATORS.get(section.metrics[0], "task.metrics").from_texts
        assert from_texts is not None
        return from_texts([text], [references])

    def _prompt(self, section: GeneratedConfig, tokenizer: Any) -> _Prompt:
        return _Prompt(section, self.filled(section, section.template or self.template(section)), tokenizer)


_NO_TEMPLATE = "task.chat: this model's tokenizer has no chat template."


def _chosen(section: GeneratedConfig) -> dict[str, Any]:
    """How tokens are chosen, as `Prompts` has it."""
    return {"temperature": section.temperature, "top_p": section.top_p, "seed": section.split_seed}


def _references(rows: Rows, targets: Sequence[str]) -> list[tuple[str, ...]]:
    """Of each row what `read` found; none where no column is named."""
    return list(rows.columns[targets[0]]) if targets else [()] * len(rows)


def references_of(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """A row's references.

    Args:
        values: column -> a text, a list of texts, or None where the row has none; no column where they are not known.
        where: the row, for messages.

    Raises:
        InputError: there are columns, and no reference in them, or one that is blank or no text.
    """
    found: list[str] = []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            text = as_text(one)
            if text is None or not text.strip():
                raise InputError(f"{where}: '{name}' has {'an empty reference' if text is not None else f'{one!r}, which is no text'}.")
            found.append(text)
    if values and not found:
        raise InputError(f"{where} has no reference in {' or '.join(map(repr, values))}.")
    return tuple(found)


class _Prompt:
    """How a section makes prompts and examples.

    Attributes:
        room: tokens that a text may have, beside the template and what is generated.
    """

    def __init__(self, section: GeneratedConfig, template: str, tokenizer: Any):
        self._section, self._template, self._tokenizer = section, template, tokenizer
        self._start = start_ids(tokenizer)
        if section.chat:
            template_of(tokenizer, _NO_TEMPLATE)
        around = len(self.ids([""], [0])[0])
        self.room = section.max_length - section.max_new_tokens - around
        if self.room < 1:
            raise InputError(
                f"task.max_length: {section.max_length} leaves no room for text beside the {around} tokens of the template and "
                f"task.max_new_tokens = {section.max_new_tokens}."
            )

    def ids(self, texts: Sequence[str], numbers: Sequence[int]) -> list[list[int]]:
        """The tokens of each text's prompt.

        Args:
            numbers: of the rows in their file, for messages.
        """
        if self._section.chat:
            date = self._section.date
            rows = zip(texts, numbers, strict=True)
            return [prompt_ids(self._messages(text), self._tokenizer, f"task.chat: row {number}", date) for text, number in rows]
        return [with_start(ids, self._start) for ids in plain_ids(self._tokenizer, [self._filled(text) for text in texts])]

    def examples(self, texts: Sequence[str], targets: Sequence[str], numbers: Sequence[int]) -> list[Example]:
        """Each text's prompt and its target, the loss on the latter."""
        length = self._section.max_length
        if self._section.chat:
            made = []
            for text, target, number in zip(texts, targets, numbers, strict=True):
                said = [*self._messages(text), {"role": "assistant", "content": target}]
                chat = encode_chat(said, self._tokenizer, number, self._section.date)
                made.append(next_token(chat.ids, chat.wanted, length))
            return made
        # The space that parts a target from its prompt is the target's, as tokenizers have it.
        apart = [self._filled(text)[-1:].isspace() for text in texts]
        targets = [target if is_apart or target[0].isspace() else f" {target}" for target, is_apart in zip(targets, apart, strict=True)]
        found = zip(self.ids(texts, numbers), plain_ids(self._tokenizer, targets), targets, strict=True)
        pairs = [(before, with_end(ids, target, self._tokenizer)) for before, ids, target in found]
        return [next_token([*b, *answer], [False] * len(b) + [True] * len(answer), length) for b, answer in pairs]

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = self._section.system
        return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": self._filled(text)}]

    def _filled(self, text: str) -> str:
        return self._template.replace("{text}", text)
