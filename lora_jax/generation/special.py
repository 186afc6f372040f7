"""Which tokens end what a model generates, and which of them an encoder-decoder does not choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import InputError, warn
from ..models.encoder_decoder import EncoderDecoder, Generative
from ..weights.checkpoint import read_json
from ..weights.load import HUB_FILES, resolve


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """Tokens that an encoder-decoder does not choose; () int32 each, -1 for none.

    Attributes:
        start: what its decoder begins with.
        first, last: what stands at the first place after it (a language's code), and at place `limit`, the last there may be.
        limit: how many tokens may follow the start.
    """

    start: jax.Array
    first: jax.Array
    last: jax.Array
    limit: jax.Array

    def at(self, count: jax.Array) -> jax.Array:
        """() int32: the token after `count` others; -1 where it is free."""
        return jnp.where((count == 0) & (self.first >= 0), self.first, jnp.where(count == self.limit - 1, self.last, -1))


def stop_tokens(model: Generative, tokenizer: Any = None) -> list[int]:
    """The tokens that end a text: what the checkpoint's config, its generation config and the tokenizer say."""
    return sorted({i for ids in (*_said(model, "eos_token_id"), getattr(tokenizer, "eos_token_id", None)) for i in _ids(ids)})


def forced_tokens(model: Generative, limit: int, start: int | None = None, first: int | None = None) -> Forced | None:
    """The tokens that an encoder-decoder does not choose: those given, else what its checkpoint says; None for a decoder.

    Args:
        limit: how many tokens it may choose in all.
        start, first: `decoder_start_token_id` and `forced_bos_token_id`, as given.

    Raises:
        InputError: a decoder, and one is given; nothing says what targets begin with; or a token is not of the vocabulary.
    """
    given = {"decoder_start_token_id": start, "forced_bos_token_id": first}
    if not isinstance(model, EncoderDecoder):
        if named := next((name for name, token in given.items() if token is not None), None):
            raise InputError(f"{named}: goes with an encoder-decoder; this model is a decoder.")
        return None
    for name, token in given.items():
        if token is not None and not 0 <= token < model.config.vocab:
            raise InputError(f"{name}: {token} is outside 0..{model.config.vocab - 1}.")
        if token is None:
            given[name] = next((i for ids in _said(model, name) for i in _ids(ids)), None)
    if given["decoder_start_token_id"] is None:
        given["decoder_start_token_id"] = model.config.start
    if given["decoder_start_token_id"] is None:
        raise InputError(
            "decoder_start_token_id: the checkpoint doesn't say what targets begin with; give the code of the target language."
        )
    last = next((i for ids in _said(model, "forced_eos_token_id") for i in _ids(ids)), None)
    begin, language, end = (jnp.int32(-1 if token is None else token) for token in (*given.values(), last))
    return Forced(begin, language, end, jnp.int32(limit))


def _said(model: Generative, key: str) -> list[Any]:
    """What the checkpoint's generation config says of a key, then its config."""
    if model.origin is None:
        return []
    found = [model.origin.config.get(key)]
    try:
        file = resolve(model.origin.source, key="model.source", hub_patterns=HUB_FILES)
        file = (file if file.is_dir() else file.parent) / "generation_config.json"
        return [read_json(file, "the generation config").get(key), *found] if file.is_file() else found
    except InputError as error:  # the checkpoint has moved, or the file is damaged
        warn(f"{key} is that of the config and the tokenizer alone: {error}")
        return found


def _ids(value: Any) -> list[int]:
    """Token ids, one or a list, that are some."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
