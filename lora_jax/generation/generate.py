"""`generate`: prompts in (plain text, chats through the model's template, or tokens), texts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..data.pairs import source_ids
from ..data.prompts import Prompts
from ..data.tokens import prompt_ids
from ..errors import InputError
from ..models.encoder_decoder import EncoderDecoder, Generative
from ..models.heads import Classifier
from .beam import Beams, beam_search
from .decoding import Continuation, Decoding, DecodingParams, padded_length
from .sampling import Sampling, row_seeds
from .special import forced_tokens, stop_tokens

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def encode_prompt(prompt: Prompt, tokenizer: Any, number: int = 0, *, source: bool = False) -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: text; or messages `{role, content}`, put through the chat template up to where the assistant begins; or token ids.
        tokenizer: of the model; None will do for token ids.
        number: which prompt it is, for messages.
        source: whether it is an encoder-decoder's source, which ends where the text does.

    Raises:
        InputError: it is empty, or of another kind, or there is no tokenizer or chat template for it.
    """
    if source and isinstance(prompt, str):
        ids = source_ids(prompt, _needed(tokenizer, number), f"prompt {number}")
    elif isinstance(prompt, str):
        ids = prompt_ids(prompt, _needed(tokenizer, number), f"prompt {number}")
    elif prompt and all(isinstance(part, Mapping) and {"role", "content"} <= part.keys() for part in prompt):
        ids = prompt_ids([m for m in prompt if isinstance(m, Mapping)], _needed(tokenizer, number), f"prompt {number}")
    elif all(isinstance(part, int) or hasattr(part, "__index__") for part in prompt):
        ids = [int(part) for part in prompt]  # pyright: ignore[reportArgumentType]
    else:
        raise InputError(f"prompt {number}: neither text, nor token ids, nor messages with 'role' and 'content'.")
    if not ids:
        raise InputError(f"prompt {number}: is empty; there is nothing to continue.")
    return ids


def _needed(tokenizer: Any, number: int) -> Any:
    if tokenizer is None:
        raise InputError(f"prompt {number}: text needs a tokenizer (load_tokenizer); without one prompts are token ids.")
    return tokenizer


class TextStream:
    """Tokens of one row to the text that each adds.

    A character may be made of several tokens: what is incomplete is held back.

    Args:
        tokenizer: of the model.
        stop: tokens that are not shown.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, frozenset(stop)
        self._ids: list[int] = []
        self._start, self._end = 0, 0  # of the tokens that the last piece was made of

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add to those before."""
        self._ids += [i for i in ids if i not in self._stop]
        # A piece may depend on what stands before it (a leading space): text is compared with and without the new tokens.
        before = self._decode(self._ids[self._start : self._end])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        before, now = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        self._start = self._end = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


Stream = Callable[[int, Any], None]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model generated after a prompt.

    Attributes:
        tokens: the new tokens, with the one that ended it, if one did.
        text: of the new tokens, without special ones; None without a tokenizer.
        ended: whether a stop token ended it; else it is as long as it was allowed to be.
    """

    tokens: list[int]
    text: str | None
    ended: bool


class Generator:
    """A model, or several of one structure, prepared for generation. Compiled programs are shared by all models of that structure.

    Args:
        models: a decoder or encoder-decoder with or without adapters (from `load_model`, `inject`, `AdapterBank.use` or `mixed`, or a
            run). Or several that differ only in their adapters, such as the members of a pack: they run as one program over one base.
        tokenizer: the model's tokenizer; without one, prompts and results are token ids.
        length: minimal number of tokens, prompt and answer, that the KV cache has room for. A conversation sets it, to compile once.

    Raises:
        InputError: a model is neither.
    """

    def __init__(self, models: nnx.Module | Sequence[nnx.Module], tokenizer: Any = None, *, length: int = 0):
        self._single = isinstance(models, nnx.Module)
        self._models = [_decoder_of(m) for m in ([models] if isinstance(models, nnx.Module) else models)]
        self._tokenizer, self._length = tokenizer, length
        self.decoding = Decoding(self._models)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        stream: Stream | None = None,
        decoder_start_token_id: int | None = None,
        forced_bos_token_id: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        no_repeat_ngram_size: int = 0,
    ) -> Any:
        """See `generate`."""
        beams = Beams(num_beams, length_penalty, early_stopping, no_repeat_ngram_size)
        sampling, crossed = Sampling(temperature, top_k, top_p), isinstance(self._models[0], EncoderDecoder)
        rows = [encode_prompt(p, self._tokenizer, i, source=crossed) for i, p in enumerate(prompts)]
        if not rows or max_new_tokens < 1:
            raise InputError("prompts: the list is empty." if not rows else f"max_new_tokens: must be at least 1, got {max_new_tokens}.")
        if stream is not None and not self._single:
            raise InputError("stream: one model at a time.")
        if beams.count > 1 and (stream is not None or sampling != Sampling()):
            raise InputError("num_beams: beam search neither streams nor samples (temperature, top_k, top_p).")
        model = self._models[0]
        _check(rows, model, max_new_tokens)
        forced = forced_tokens(model, max_new_tokens, decoder_start_token_id, forced_bos_token_id)
        stops = stop_tokens(model, self._tokenizer) if stop is None else [int(s) for s in stop]
        pad = getattr(self._tokenizer, "pad_token_id", None) or 0
        tokens, mask = padded(rows, pad, right=crossed)
        params = DecodingParams(
            sampling.params(model.config.vocab),
            row_seeds(seed, len(rows)),
            # Of one shape for the usual few.
            jnp.asarray(stops + [-1] * max(0, 8 - len(stops)), jnp.int32),
            jnp.int32(pad),
            forced,
        )
        method, room = sampling.method, padded_length(max_new_tokens)
        total = padded_length(1 + room if crossed else max(tokens.shape[1] + room, self._length))
        if beams.count > 1:
            out = beam_search(self.decoding, tokens, mask, params, beams, max_new_tokens, room, total)
        else:
            batch = Continuation(self.decoding, tokens, mask, params, method, room, total)
            if stream is None:
                batch.advance(max_new_tokens)
            else:
                _pass_on(batch, max_new_tokens, _Streamer(stream, len(rows), self._tokenizer, stops))
            out = batch.tokens
        out = out[..., :max_new_tokens]
        if self._single:
            return [self._result(row, stops) for row in out]
        return [[self._result(row, stops) for row in member] for member in (out if out.ndim == 3 else out[None])]

    def _result(self, row: np.ndarray, stops: Sequence[int]) -> Generated:
        ends = np.flatnonzero(np.isin(row, stops))
        tokens = row[: ends[0] + 1 if len(ends) else None].tolist()
        text = None if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Generated(tokens, text, bool(len(ends)))


class Options(TypedDict, total=False):
    """What `generate` takes by name."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop: Sequence[int] | None
    seed: int | Sequence[int]
    stream: Stream | None
    decoder_start_token_id: int | None
    forced_bos_token_id: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int


@overload
def generate(model: nnx.Module, prompts: Sequence[Prompt], tokenizer: Any = ..., **options: Unpack[Options]) -> list[Generated]: ...


@overload
def generate(
    model: Sequence[nnx.Module], prompts: Sequence[Prompt], tokenizer: Any = ..., **options: Unpack[Options]
) -> list[list[Generated]]: ...


def generate(model: nnx.Module | Sequence[nnx.Module], prompts: Sequence[Prompt], tokenizer: Any = None, **options: Unpack[Options]) -> Any:
    """Generates text from prompts: one batch, each row until a stop token or `max_new_tokens`.

    Compiles once per shape (prompts and new tokens are padded to a few lengths) and sampling mode, for all models of one structure.
    Keep a `Generator` to reuse the prepared model too. If the longest row grows past the original context of `longrope` positions
    (Phi-3), all rows are run again from their start, so that every key uses the long factors. transformers does this for Phi-3. Only
    for these models does a row depend on the other rows of its batch.

    Args:
        model: a decoder or encoder-decoder, with or without adapters; for rows with adapters of their own, the model from
            `AdapterBank.mixed`. Or a list of models that differ only in their adapters, such as the members of a pack, which decode
            together.
        prompts: each a text, token ids, or messages `{role, content}` (formatted by the chat template). To an encoder-decoder a prompt
            is the source.
        tokenizer: from `load_tokenizer`; None if prompts are token ids.
        max_new_tokens: the largest number of new tokens (64).
        temperature: divides the logits before sampling; 0, the default, decodes greedily.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens of total probability p; applied after `top_k`.
        stop: token ids that end a row; by default those of the model and its tokenizer.
        seed: row i samples with seed + i; or one seed per row. A row's samples depend on its own seed alone.
        stream: called as `stream(row, piece)` with each new piece of text, or token ids without a tokenizer.
        decoder_start_token_id: what an encoder-decoder's target begins with, where the checkpoint doesn't say (mBART: the language).
        forced_bos_token_id: the first token of its answer (mBART-50: the language); by default what the checkpoint says, if it does.
        num_beams, length_penalty, early_stopping, no_repeat_ngram_size: beam search, of 2 beams or more (`Beams`).

    Returns:
        one `Generated` per prompt; for several models a list of these per model.

    Raises:
        InputError: a model is neither a decoder nor an encoder-decoder, a prompt is empty or too long, or a number is out of range.

    >>> outputs = generate(model, ["The film was"], tokenizer, max_new_tokens=8)  # doctest: +SKIP
    >>> outputs[0].text  # doctest: +SKIP
    ' a huge success, and it was'
    """
    return Generator(model, tokenizer)(prompts, **options)


def padded(rows: Sequence[Sequence[int]], pad: int, *, right: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, (rows, length) int32 each, with padding on one side up to one of the lengths that shapes have."""
    length = padded_length(max(len(row) for row in rows))
    tokens, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        own = slice(0, len(row)) if right else slice(length - len(row), length)
        tokens[i, own], mask[i, own] = row, 1
    return tokens, mask


def _pass_on(batch: Continuation, most: int, streamer: _Streamer) -> None:
    """Decodes token by token, up to `most`, and streams each."""
    streamer(batch.tokens[:, :1])
    for count in range(2, most + 1):
        if batch.ended:
            break
        batch.advance(count)
        streamer(batch.tokens[:, count - 1 : count])
    streamer.finish()


def decode_prompts(
    models: Sequence[nnx.Module], prompts: Prompts, tokenizer: Any, *, batch_size: int, told: Callable[[int], object] = lambda rows: None
) -> list[list[str]]:
    """What models generate after prompts: for each model the texts, one a prompt, without white space around them.

    The prompts are sorted by length and decoded `batch_size` at a time, the last batch filled up with copies: few shapes occur.

    Args:
        models: that differ only in their adapters; they decode together.
        batch_size: rows at a time.
        told: called after each batch with the number of rows that are done.

    Raises:
        InputError: a model is not a decoder, or a prompt is too long for it.
    """
    longest = max(map(len, prompts.tokens))
    # One shape of the cache for all batches, so that one program goes on from all of them.
    total = padded_length(longest) + padded_length(prompts.max_new_tokens)
    generator = Generator(list(models), tokenizer, length=total)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts.tokens[i]), i))
    texts = [[""] * len(prompts) for _ in models]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        filled = [*chosen, *chosen[:1] * (batch_size - len(chosen))]
        outputs_of = generator(
            [prompts.tokens[i].tolist() for i in filled],
            max_new_tokens=prompts.max_new_tokens,
            temperature=prompts.temperature,
            top_p=prompts.top_p,
            seed=[prompts.seed + i for i in filled],
        )
        for own, outputs in zip(texts, outputs_of, strict=True):
            for i, output in zip(chosen, outputs, strict=False):  # without the copies
                own[i] = str(output.text).strip()
        told(start + len(chosen))
    return texts


class _Streamer:
    """Passes each row's new tokens or text to a stream."""

    def __init__(self, stream: Stream, rows: int, tokenizer: Any, stops: Sequence[int]):
        self._stream, self._stops = stream, frozenset(stops)
        self._texts = None if tokenizer is None else [TextStream(tokenizer, stops) for _ in range(rows)]
        self._ended = [False] * rows

    def __call__(self, new: np.ndarray) -> None:
        for row, ids in enumerate(new.tolist()):
            if self._ended[row]:
                continue
            self._ended[row] = any(i in self._stops for i in ids)
            piece = ids if self._texts is None else self._texts[row].add(ids)
            if piece:
                self._stream(row, piece)

    def finish(self) -> None:
        for row, text in enumerate(self._texts or ()):
            if rest := text.rest():
                self._stream(row, rest)


def _decoder_of(model: nnx.Module) -> Generative:
    # A language-model task wraps a base whose own vocabulary logits are the answer; a classification head replaces them.
    inner = model if isinstance(model, Generative) else getattr(model, "base", None)
    if not isinstance(inner, Generative) or isinstance(model, Classifier):
        raise InputError(f"generate needs a decoder; this model is {_article(type(model).__name__)}.")
    return inner


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


# Of a model that does not say its context: more than this is a mistake, and would fill the memory before it is seen to be one.
_MOST_TOKENS = 1 << 17


def context_length(model: Generative) -> int | None:
    """How many tokens a model takes: its learned positions, or what its checkpoint says; None where neither is known.

    Of an encoder-decoder source and target may each have so many.

    Rotary frequencies of the kind `dynamic` stretch with the text: what the checkpoint says is where that begins.
    """
    if isinstance(model, EncoderDecoder):
        return model.config.longest
    if any(layer.rotary is not None and layer.rotary.kind == "dynamic" for layer in model.config.layer_types):
        return model.config.positions
    said = None if model.origin is None else model.origin.config.get("max_position_embeddings")
    return model.config.positions or (said if isinstance(said, int) and said > 0 else None)


def _check(rows: Sequence[Sequence[int]], model: Generative, new: int) -> None:
    vocab, most = model.config.vocab, context_length(model) or _MOST_TOKENS
    if isinstance(model, EncoderDecoder):
        vocab = model.config.source_vocab or vocab
        if new > most:
            raise InputError(f"max_new_tokens: {new:,} tokens exceed the model's {most:,} positions.")
        new = 0
    for i, row in enumerate(rows):
        if not all(0 <= t < vocab for t in row):
            raise InputError(f"prompt {i}: has token ids outside 0..{vocab - 1}.")
        if most is not None and len(row) + new > most:
            fits = f"; at most {most - len(row):,} new tokens fit (max_new_tokens)" if len(row) < most else ""
            more = f" and {new:,} more" if new else ""
            raise InputError(f"prompt {i}: {len(row):,} tokens{more} exceed the model's context of {most:,}{fits}.")
