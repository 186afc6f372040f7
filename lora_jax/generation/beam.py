"""Beam search: of each prompt the likeliest few continuations go on side by side, and the one with the best score is the answer.

The rules are those of transformers. In each step the `count` beams of a row have so many times the vocabulary's continuations; of the best
of them (more than `count`, so that some go on where others end) those that end are candidates for the answer, by the sum of their tokens'
log-probabilities over their length to the power of `length_penalty`, and the best of the others are the next beams. A row is done when
none of its beams can still do better, by an estimate that `early_stopping` names.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import InputError
from ..models.cache import Cache, slots_for
from ..models.encoder_decoder import Generative
from ..models.layers import LayerType
from .decoding import Decoding, DecodingParams, member_axes, prefilled
from .special import Forced

Array = jax.Array
_NEVER = -1e9  # the score of what is none


@dataclasses.dataclass(frozen=True)
class Beams:
    """How beam search is done.

    Attributes:
        count: beams a row; 1: no beam search.
        length_penalty: the power of the length that a finished beam's score is divided by; above 0 longer answers are preferred.
        early_stopping: when a row is done: as soon as `count` beams have ended (True), where the best that goes on is worse than the worst
            that has ended, at its present length (False), or at the best length that it may still have ("never").
        no_repeat_ngram_size: no sequence of so many tokens comes twice, the prompt of a decoder counted; 0: any may.

    Raises:
        InputError: a number out of range, or an option without beams.
    """

    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"num_beams: must be at least 1, got {self.count}.")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping: must be true, false or 'never', got {self.early_stopping!r}.")
        if not -float("inf") < self.length_penalty < float("inf"):
            raise InputError(f"length_penalty: must be a finite number, got {self.length_penalty}.")
        if self.no_repeat_ngram_size < 0:
            raise InputError(f"no_repeat_ngram_size: must be at least 0, got {self.no_repeat_ngram_size}.")
        if self.count > 1:
            return
        for name, default in (("length_penalty", 1.0), ("early_stopping", False), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) != default:
                raise InputError(f"{name}: goes with num_beams of 2 or more.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """State of a batch in beam search. With members, all arrays but `cache.length` and `count` have them in front.

    Attributes:
        cache: of rows * beams sequences, without the last token of each.
        running, scores: (rows, beams, room) int32 and (rows, beams) float32, the beams and the sums of their log-probabilities.
        found, found_scores: the same of those that have ended, the best first, their scores by length.
        finished: (rows, beams) bool, which of `found` are some.
        improvable: (rows, 1) bool, rows whose beams may still do better.
        done: () bool, whether the search is over.
        count: () int32, tokens of the beams so far.
    """

    cache: Cache
    running: Array
    scores: Array
    found: Array
    found_scores: Array
    finished: Array
    improvable: Array
    done: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamParams:
    """What is data in beam search: the stop tokens (n,) int32, () int32 `pad` and most tokens `limit`, () float32 `length_penalty`.

    `prompt` and `mask`, (rows, length) int32, is what stands before the beams, and `forced` what they do not choose.
    """

    stop: Array
    pad: Array
    limit: Array
    length_penalty: Array
    prompt: Array
    mask: Array
    forced: Forced | None


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static: the options, how many continuations of a row are looked at, and the room for tokens."""

    beams: Beams
    kept: int
    room: int
    total: int


class BeamPrograms:
    """The compiled programs of models of one structure; arguments as for `decoding.Programs`."""

    def __init__(
        self, prefill: nnx.GraphDef[Any], decode: nnx.GraphDef[Any], layers: tuple[int, ...], types: tuple[LayerType, ...], members: bool
    ):
        self._prefill_def, self._decode_def, self._layers, self._types, self._members = prefill, decode, layers, types, members
        self.start = jax.jit(self._start, static_argnums=5)
        self.search = jax.jit(self._search, static_argnums=4, donate_argnums=2)

    def _start(self, own: Any, shared: Any, tokens: Array, mask: Array, params: BeamParams, form: _Form) -> BeamState:
        """Runs prompts (or sources), and chooses the first token of each beam."""
        rows, beams = tokens.shape[0], form.beams.count

        def run(own: Any) -> BeamState:
            model: Generative = nnx.merge(self._prefill_def, own, shared)
            hidden, cache = prefilled(model, tokens, mask, form.total, params.forced)
            blank = jnp.full((rows, beams, form.room), params.pad, jnp.int32)
            none = jnp.full((rows, beams), _NEVER, jnp.float32)
            # Of equal beams the first alone counts.
            state = BeamState(
                cache=_repeated(cache.regrouped(self._layers), beams),
                running=blank,
                scores=none.at[:, 0].set(0.0),
                found=blank,
                found_scores=none,
                finished=jnp.zeros((rows, beams), bool),
                improvable=jnp.ones((rows, 1), bool),
                done=jnp.array(False),
                count=jnp.int32(0),
            )
            return _select(state, state.cache, jnp.repeat(model.head(hidden), beams, axis=0), params, form)

        return jax.vmap(run, out_axes=self._axes(form))(own) if self._members else run(own)

    def _search(self, own: Any, shared: Any, state: BeamState, params: BeamParams, form: _Form) -> BeamState:
        """Goes on to the end; what `state` holds is used up."""

        def step(own: Any, state: BeamState) -> BeamState:
            model: Generative = nnx.merge(self._decode_def, own, shared)
            last = jax.lax.dynamic_index_in_dim(state.running, state.count - 1, axis=2, keepdims=False)
            hidden, cache = model.extend(state.cache, last.reshape(-1, 1))
            return _select(state, cache, model.head(hidden[:, 0]), params, form)

        if self._members:
            lanes = self._axes(form)
            step = jax.vmap(step, in_axes=(0, lanes), out_axes=lanes)
        # A member that is done goes on with the others: its answer changes no more.
        return jax.lax.while_loop(lambda s: ~jnp.all(s.done), lambda s: step(own, s), state)

    def _axes(self, form: _Form) -> BeamState:
        names = ("running", "scores", "found", "found_scores", "finished", "improvable", "done")
        lanes: Any = dict.fromkeys(names, 0) | {"count": None}
        return BeamState(member_axes(slots_for(self._types, form.total)[1]), **lanes)


@functools.lru_cache(maxsize=16)
def _programs(
    prefill: nnx.GraphDef[Any], decode: nnx.GraphDef[Any], layers: tuple[int, ...], types: tuple[LayerType, ...], members: bool
) -> BeamPrograms:
    return BeamPrograms(prefill, decode, layers, types, members)


def _select(state: BeamState, cache: Cache, logits: Array, params: BeamParams, form: _Form) -> BeamState:
    """Chooses the next tokens, from logits (rows * beams, vocab)."""
    (rows, beams, _), count, penalty = state.running.shape, state.count, params.length_penalty
    early = form.beams.early_stopping
    shares = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    vocab = shares.shape[-1]
    if form.beams.no_repeat_ngram_size:
        shares = jnp.where(_repeating(state, params, form.beams.no_repeat_ngram_size, vocab), -jnp.inf, shares)
    if params.forced is not None:
        forced = params.forced.at(count)
        shares = jnp.where(forced >= 0, jnp.where(jnp.arange(vocab) == forced, 0.0, -jnp.inf), shares)

    sums = shares.reshape(rows, beams, vocab) + state.scores[..., None]
    best, index = jax.lax.top_k(sums.reshape(rows, -1), form.kept)
    parents, tokens = index // vocab, (index % vocab).astype(jnp.int32)
    grown = jnp.take_along_axis(state.running, parents[..., None], axis=1)
    grown = jax.lax.dynamic_update_slice_in_dim(grown, tokens[..., None], count, axis=2)
    ends = jnp.isin(tokens, params.stop) | (count + 1 >= params.limit)

    # The beams that go on.
    scores, at = jax.lax.top_k(best + ends * _NEVER, beams)
    running, parents = jnp.take_along_axis(grown, at[..., None], axis=1), jnp.take_along_axis(parents, at, axis=1)

    # Those that have ended: only what is among the best `beams` is a candidate.
    just = ends & (jnp.arange(form.kept) < beams)
    by_length = best / (count + 1).astype(jnp.float32) ** penalty
    if early is True:
        by_length += jnp.all(state.finished, axis=1, keepdims=True) * _NEVER
    by_length += ~state.improvable * _NEVER
    by_length += ~just * _NEVER
    found_scores, at = jax.lax.top_k(jnp.concatenate([state.found_scores, by_length], axis=1), beams)
    found = jnp.take_along_axis(jnp.concatenate([state.found, grown], axis=1), at[..., None], axis=1)
    finished = jnp.take_along_axis(jnp.concatenate([state.finished, just], axis=1), at, axis=1)

    # Whether there is more to find.
    count = count + 1
    longest = jnp.where(penalty > 0, params.limit, count) if early == "never" else count
    possible = scores[:, :1] / longest.astype(jnp.float32) ** penalty
    worst = jnp.where(finished, found_scores.min(axis=1, keepdims=True), _NEVER)
    improvable = state.improvable & jnp.any(possible > worst, axis=1, keepdims=True)
    over = jnp.all(finished) if early is True else jnp.array(False)
    done = ~jnp.any(improvable) | over | jnp.all(ends)
    return BeamState(_reordered(cache, parents), running, scores, found, found_scores, finished, improvable, done, count)


def _repeating(state: BeamState, params: BeamParams, size: int, vocab: int) -> Array:
    """(rows * beams, vocab) bool: which tokens would make a sequence of `size` tokens that was there before."""
    beams = state.running.shape[1]
    before = jnp.repeat(params.prompt, beams, axis=0)
    told = jnp.concatenate([before, state.running.reshape(-1, state.running.shape[2])], axis=1)
    length = before.shape[1] + state.count
    place = jnp.arange(told.shape[1])
    real = jnp.concatenate([jnp.repeat(params.mask, beams, axis=0) > 0, jnp.ones_like(told[:, before.shape[1] :], bool)], axis=1)
    windows = told.shape[1] - size + 1
    same = real[:, :windows] & (place[:windows] + size <= length)
    for offset in range(size - 1):
        last = jax.lax.dynamic_index_in_dim(told, length - size + 1 + offset, axis=1)
        same &= told[:, offset : offset + windows] == last
    # What is no repetition goes to a column beyond the vocabulary.
    column = jnp.where(same, told[:, size - 1 :], vocab)
    rows = jnp.arange(told.shape[0])[:, None]
    return jnp.zeros((told.shape[0], vocab + 1), bool).at[rows, column].set(True)[:, :vocab]


def _rows_axis(array: Array) -> int:
    """Which axis of a segment's keys or values counts rows: layers stand in front where there are several."""
    return 1 if array.ndim == 5 else 0


def _repeated(cache: Cache, beams: int) -> Cache:
    """A cache in which each row stands `beams` times, one after the other."""
    kept = [tuple(jnp.repeat(a, beams, axis=_rows_axis(a)) for a in segment) for segment in cache.kept]
    real = None if cache.source_real is None else jnp.repeat(cache.source_real, beams, axis=0)
    rows = {"real": jnp.repeat(cache.real, beams, axis=0), "counts": jnp.repeat(cache.counts, beams, axis=0), "source_real": real}
    return dataclasses.replace(cache.with_kept(kept), **rows)


def _reordered(cache: Cache, parents: Array) -> Cache:
    """The cache of the beams that go on, from that of their `parents`, (rows, beams). A row's source is the same for all its beams."""
    rows, beams = parents.shape
    index = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
    keys, values = (tuple(jnp.take(a, index, axis=_rows_axis(a)) for a in arrays) for arrays in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


def beam_search(
    decoding: Decoding, tokens: np.ndarray, mask: np.ndarray, params: DecodingParams, beams: Beams, limit: int, room: int, total: int
) -> np.ndarray:
    """The best continuation of each row, (rows, room) int32, with members (members, rows, room); padding after its end.

    Args:
        decoding: of the models.
        tokens, mask, params, room, total: of `Decoding.start`; how tokens are drawn is nothing to beam search.
        beams: the options.
        limit: how many tokens an answer may have.

    Raises:
        InputError: a row may grow past a border where its earlier tokens' positions would change (`Decoder.borders`).
    """
    longest = int(mask.sum(1).max())
    if any(longest <= border < longest + limit for border in decoding.borders):
        raise InputError(
            f"num_beams: rows may grow past {decoding.borders[0]:,} tokens, where this model's positions change; decode greedily."
        )
    stops = int((np.asarray(params.stop) >= 0).sum())
    form = _Form(beams, max(2, 1 + stops) * beams.count, room, total)
    # What an n-gram may repeat: a decoder's prompt, or what a target begins with.
    before = (tokens, mask) if params.forced is None else (np.full((len(tokens), 1), int(params.forced.start)), np.ones((len(tokens), 1)))
    prompt, real = (jnp.asarray(a, jnp.int32) for a in before)
    own = BeamParams(params.stop, params.pad, jnp.int32(limit), jnp.float32(beams.length_penalty), prompt, real, params.forced)
    first, later = decoding.prefill_arrays, decoding.decode_arrays
    programs = _programs(first.graphdef, later.graphdef, later.layers, decoding.layer_types, decoding.members is not None)
    # The number is data: searches that differ in it alone are one program.
    form = dataclasses.replace(form, beams=dataclasses.replace(beams, length_penalty=1.0))
    state = programs.start(first.own, first.shared, tokens, mask, own, form)
    return np.asarray(programs.search(later.own, later.shared, state, own, form).found[..., 0, :])
