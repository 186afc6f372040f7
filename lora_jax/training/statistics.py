"""What the layers of an adapter's sites see of the data before step 0, for inits that read it (`Statistics`).

One pass over some training batches, forward and backward, over the base with the task's head and without dropout. In place of adapters
each site has arrays of zeros that change nothing of what it computes, and whose gradients are the statistics: of one `x^T x`, of another
the gradient of the weight. So they come out of stacked layers and off a mesh as any gradient does, the base itself is not
differentiated, and no activation is kept beyond its own layer's backward pass.

Padding is left out: of a whole batch by its segment ids, of the positions that a top layer is narrowed to by the weights of their
targets. What a site is given beside tokens (a table of relative positions) is not counted either; its gradient has part in the weight's.
A new head is drawn by `training.data_seed`: it is the same whatever the members' seeds are, and so is the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..adapters.inject import draw_head, inject_layout
from ..adapters.layout import Layout, SiteLayout, site_layouts
from ..adapters.methods.base import AdaptedSite, Method
from ..adapters.parameters import Parameter, Statistics, shared_name
from ..adapters.partition import Arrays, partition
from ..adapters.sites import Site, find_sites
from ..config.schema import MeshConfig
from ..data.batching import BatchPlan, Example, Examples
from ..data.files import as_text
from ..data.sources import load_rows
from ..data.split import sample_rows
from ..data.tokens import encoder_texts, plain_ids, start_ids, with_start
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.encoder_decoder import EncoderDecoder, sees_targets
from ..models.heads import HiddenStates, TaskModel
from ..models.layers import Rows
from ..models.transforms.calibration import CalibrationConfig
from ..parallel.constraints import place_batch, targets_by_rows
from ..parallel.mesh import make_mesh, to_host
from ..parallel.program import Program, compiler_options, release_freed_memory
from ..tasks.objectives import Objective, total_weight
from ..weights.tokenizer import check_text, load_tokenizer
from .step import Batch

Seen = dict[tuple[str, int], Statistics]


@dataclasses.dataclass(frozen=True)
class Watch(Method):
    """A method that changes nothing, and whose arrays have the statistics as their gradients.

    Attributes:
        watched: any of `moment`, `gradient` and `squares`.
        crossed: whether there is a decoder that is given tokens of its own.
    """

    watched: frozenset[str]
    crossed: bool = False

    name, kinds = "watch", ("linear",)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        found = {
            "moment": Parameter((site.inputs, site.inputs), axes=("in", None)),
            "gradient": Parameter((site.inputs, site.outputs), axes=("in", "out")),
            "squares": Parameter((site.inputs,), axes=("in",)),
        }
        # Of each position of the batch, and of each target, whether it is none of padding; of any shape.
        names = ("real", "targets", *(("decoder_real",) if self.crossed else ()))
        masks = {name: Parameter((1,), trained=False, scope="adapter") for name in names}
        return {name: p for name, p in found.items() if name in self.watched} | {"count": Parameter(())} | masks

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        (x,), y = inputs, module.base(*inputs)
        own = module.decoder_real if self.crossed and sees_targets(module.site.path) else module.real
        real = (own if rows is None else module.targets)[...].reshape(-1)
        if math.prod(x.shape[:-1]) != real.size:
            real = jnp.zeros(math.prod(x.shape[:-1]))
        arrays = {name: getattr(module, name)[...] for name in ("count", *sorted(self.watched))}
        return _watched(y, x, real, arrays)


@jax.custom_vjp
def _watched(y: jax.Array, x: jax.Array, real: jax.Array, arrays: Arrays) -> jax.Array:
    """y; the gradients of the arrays are what is known of x (..., inputs), `real` (n,) saying which rows count."""
    return y


def _forward(y: jax.Array, x: jax.Array, real: jax.Array, arrays: Arrays) -> tuple[jax.Array, Any]:
    return y, (x, real, dict.fromkeys(arrays, jnp.float32(0)))  # their names alone


def _backward(kept: Any, dy: jax.Array) -> Any:
    x, real, names = kept
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    made = {
        "count": lambda: real.sum(),
        "moment": lambda: exact((rows * real[:, None]).T, rows),
        "gradient": lambda: exact(rows.T, dy.reshape(rows.shape[0], -1).astype(jnp.float32)),
        "squares": lambda: jnp.sum(jnp.square(rows) * real[:, None], axis=0),
    }
    return dy, jnp.zeros_like(x), jnp.zeros_like(real), {name: made[name]() for name in names}


_watched.defvjp(_forward, _backward)


def gather(
    model: nnx.Module,
    sites: Sequence[SiteLayout],
    wants: frozenset[str],
    batches: Iterable[Batch],
    objective: Objective,
    *,
    seed: int,
    mesh: Mesh,
) -> Seen:
    """The statistics of every layer that the linear sites of a layout have arrays for.

    Args:
        model: the base with the task's head, without adapters.
        sites: of a layout.
        wants: any of `moment`, `gradient` and `squares`.
        batches: training batches on the mesh, as a step takes them; at least one. The gradient is the mean over these, each of the mean
            loss over its targets or examples; moments and tokens are their sum.
        objective: the loss.
        seed: of a new head.
        mesh: of the base.
    """
    watch = Watch(wants, any(isinstance(m, EncoderDecoder) for _, m in nnx.iter_modules(model)))
    own = tuple(dataclasses.replace(s, extent=(1,)) for s in sites if s.site.kind in watch.kinds)
    adapted = inject_layout(model, Layout(own, False, watch, "none", ()))
    draw_head(adapted, seed)
    part = partition(adapted)
    rest = {name: array for name, array in part.trainable.items() if name not in part.parameters}

    def of_step(rest: Arrays, frozen: Arrays, batch: Batch) -> Arrays:
        total = jnp.maximum(total_weight(batch), 1.0)
        zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in part.trainable.items() if name in part.parameters}

        def loss_of(arrays: Arrays, micro: Batch) -> jax.Array:
            masks = {"real": "segment_ids", "targets": "target_weights", "decoder_real": "decoder_segment_ids"}
            real = {shared_name(n): (micro[of] > 0).astype(jnp.float32) for n, of in masks.items() if of in micro}
            settings = part.settings | real
            grown = cast(TaskModel, part.merge(rest | arrays, settings, frozen, training=False))
            return objective(grown, grown.features(micro), micro)[0] / total

        def of_micro(sums: Arrays, micro: Batch) -> tuple[Arrays, None]:
            return jax.tree.map(jnp.add, sums, jax.grad(loss_of)(zeros, targets_by_rows(micro))), None

        return jax.lax.scan(of_micro, zeros, batch)[0]

    program = Program(of_step, "statistics", mesh=mesh, options=compiler_options())
    sums: dict[str, np.ndarray] = {}
    seen = 0
    for batch in batches:
        seen += 1
        for name, array in program(rest, part.frozen, batch).items():
            sums[name] = sums.get(name, 0) + to_host(array).astype(np.float64)
    release_freed_memory()
    found: Seen = {}
    for of in own:
        for layer in range(of.first, len(of.site.names)):
            arrays = {
                name: sums[key][layer - of.first] if of.site.depth is not None else sums[key]
                for name in ("count", *wants)
                if (key := f"{of.site.name}.{name}") in sums
            }
            gradient = arrays.get("gradient")
            gradient = None if gradient is None else gradient / seen
            found[of.site.name, layer] = Statistics(arrays.get("moment"), gradient, round(float(arrays["count"])), arrays.get("squares"))
    return found


def lacks(known: Mapping[tuple[str, int], Statistics], where: tuple[str, int], wants: frozenset[str]) -> bool:
    """Whether a layer's statistics are not all known."""
    seen = known.get(where)
    return bool(wants) and (seen is None or any(getattr(seen, name) is None for name in wants))


def joined(known: Seen, more: Seen) -> Seen:
    """The statistics of both; of one layer in both each has what the other lacks."""

    def both(a: Statistics | None, b: Statistics) -> Statistics:
        if a is None:
            return b
        pairs = ((a.moment, b.moment), (a.gradient, b.gradient), (a.squares, b.squares))
        moment, gradient, squares = (x if x is not None else y for x, y in pairs)
        return Statistics(moment, gradient, b.tokens, squares)

    return known | {where: both(known.get(where), seen) for where, seen in more.items()}


# Bytes of moments that one pass over the calibration rows gathers.
PASS_BYTES = 512 * 2**20
_KEY = "model.transforms: calibration"


def calibrate(source: str, base: nnx.Module, section: CalibrationConfig, names: Sequence[str], what: str) -> Seen:
    """What linear layers of a base see of rows of text (`models.transforms.calibration.Calibrate`).

    The whole base is computed on one device, wherever it lies: equal bits come out on any mesh, and a run's adapters are evaluated and
    exported over a base that is calibrated anew. That device has to hold it.

    Args:
        source: of the checkpoint, whose tokenizer is taken.
        base: without adapters.
        section: which rows.
        names: of the layers.
        what: `squares` or `moment`. Moments are gathered in as many passes as keep them below `PASS_BYTES`.

    Raises:
        InputError: the base is neither an encoder nor a decoder, or a row or the tokenizer will not do.
    """
    if not isinstance(base, Encoder | Decoder):
        raise InputError(f"{_KEY}: rows of text calibrate an encoder or a decoder, and the model is a {type(base).__name__}.")
    examples = _calibration_rows(source, base, section)
    plan = BatchPlan(examples, examples, batch_size=min(section.batch_size, len(examples.tokens)), per_example=False, steps=1)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    graphdef, state = nnx.split(base, graph=True)
    whole = jax.tree.map(lambda a: a if len(a.devices()) == 1 else jax.device_put(to_host(a), jax.local_devices()[0]), state)
    model = HiddenStates(nnx.merge(graphdef, whole))
    found: Seen = {}
    for chosen in _passes([s for s in find_sites(model) if s.name.removeprefix("base.") in names], what):
        sites = site_layouts(chosen, [{site.name: (0, (1,)) for site in chosen}])
        batches = (place_batch(mesh, {n: a[None] for n, a in batch.items()}, row_axis=1) for batch in plan.eval_batches())
        seen = gather(model, sites, frozenset({what}), batches, _any_loss, seed=0, mesh=mesh)
        found |= {(name.removeprefix("base."), layer): own for (name, layer), own in seen.items()}
    return found


def _any_loss(model: TaskModel, features: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What is seen of inputs does not depend on it."""
    return jnp.sum(features.astype(jnp.float32)), jnp.float32(0)


def _passes(sites: Sequence[Site], what: str) -> list[list[Site]]:
    """The sites in groups that are gathered together."""
    groups: list[list[Site]] = [[]]
    room = PASS_BYTES
    for site in sites:
        size = 4 * (site.depth or 1) * site.inputs ** (2 if what == "moment" else 1)
        if groups[-1] and size > room:
            groups.append([])
            room = PASS_BYTES
        groups[-1].append(site)
        room -= size
    return groups


def _calibration_rows(source: str, base: Encoder | Decoder, section: CalibrationConfig) -> Examples:
    """Rows as examples whose every token is looked at."""
    table = load_rows(section.source, key=f"{_KEY}.source", columns=[section.text], named_by={section.text: f"{_KEY}.text"})
    texts = [as_text(value) for value in table[section.text]]
    tokenizer = load_tokenizer(source)
    longest = base.config.longest
    if longest is not None and section.max_length > longest:
        raise InputError(f"{_KEY}.max_length: {section.max_length} tokens, but the model has {longest} positions.")
    # Blank lines say nothing: what is drawn are rows with words.
    there = [(n, text) for n, text in enumerate(texts, 1) if text is not None and text.strip()]
    if not there:
        raise InputError(f"{_KEY}.source: {section.source} has no row with text in the column '{section.text}'.")
    at = sample_rows(len(there), size=section.rows, seed=section.seed)
    drawn = [check_text(there[i][1], f"{_KEY}.source: row {there[i][0]} of {section.source}") for i in at]
    if base.is_decoder:
        start = start_ids(tokenizer)
        made = [with_start(ids, start)[: section.max_length] for ids in plain_ids(tokenizer, drawn)]
    else:
        made = [ids for ids, _ in encoder_texts(tokenizer, drawn, section.max_length)]
    tokens = [np.array(ids, np.int32) for ids in made if ids]
    if not tokens:
        raise InputError(f"{_KEY}.source: the tokenizer gives none of the {len(drawn)} rows a token.")
    if (most := max(int(ids.max()) for ids in tokens)) >= base.config.vocab:
        raise InputError(f"{_KEY}.source: the tokenizer gives the token {most}, but the model's embedding has {base.config.vocab} rows.")
    return Examples.of([Example(ids, np.zeros(len(ids), np.int32)) for ids in tokens])
