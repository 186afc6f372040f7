"""The one train step, and its evaluation: pure functions of one member, run over a pack (`pack_mode.py`), compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ..adapters.partition import Arrays, Partition, with_dropout_keys
from ..config.errors import OutOfMemory, RunError
from ..config.sizes import size_text
from ..models.heads import TaskModel
from ..models.positions import positions_of_targets
from ..models.prefix import starting_from
from ..parallel.constraints import on_mesh
from ..parallel.mesh import replicated
from .compiling import compiler_options
from .memory import program_bytes, release_freed_memory
from .objective import cross_entropy, squared_error
from .optimizer import Hyper, learning_rate, make_optimizer
from .pack_mode import VMAP, PackMode
from .targets import in_order, targets_by_rows

Batch = dict[str, jax.Array]


class MemberState(NamedTuple):
    """What a step changes: a member's trainable arrays, its optimizer state, and whether it still trains (bool)."""

    trainable: Arrays
    optimizer: Any
    alive: jax.Array


class MemberFixed(NamedTuple):
    """What a step reads of a member: hyperparameters, settings (scales, dropout), and the mask of trained layers, if there is one."""

    hyper: Hyper
    settings: Arrays
    mask: Arrays | None


class Metrics(NamedTuple):
    """Float32 scalars of one step: mean loss and share of right predictions over the labels, gradient norm, learning rate of A."""

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


def init_member(part: Partition, trainable: Arrays, fixed: MemberFixed) -> MemberState:
    """The state before step 0."""
    return MemberState(trainable, make_optimizer(fixed.hyper, part.labels).init(trainable), jnp.array(True))


def train_step(
    part: Partition, state: MemberState, fixed: MemberFixed, frozen: Arrays, batch: Batch, step: jax.Array, noise: jax.Array
) -> tuple[MemberState, Metrics]:
    """One optimizer step of one member.

    The gradient is that of the mean loss over all labels of the step, summed over its micro-batches. A member whose loss or
    gradient is not finite keeps the state it had and stops for good; under `vmap` no other member sees it.

    Args:
        part: how the arrays make a model; static.
        state: what changes.
        fixed: what is this member's own.
        frozen: the base, the same for all members.
        batch: arrays with a leading micro-batch axis, the same for all members. Where it holds a `prefix` (`prefix.py`), the model
            starts from that; `target_values` are a teacher's (`teacher.py`).
        step: int32 scalar, 0-based.
        noise: PRNG key of the base's own dropout in this step, the same for all members: what is common to them stays common.
    """
    key = jax.random.fold_in(jax.random.key(fixed.hyper.seed), step)
    total = jnp.maximum(batch["target_weights"].sum(), 1.0)

    def loss_of(trainable: Arrays, micro: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        settings = with_dropout_keys(fixed.settings, jax.random.fold_in(key, index))
        model = cast(TaskModel, part.merge(trainable, settings, frozen, training=True))
        with positions_of_targets(micro["target_index"], micro["tokens"].shape), starting_from(micro.get("prefix")):
            features = model.features(micro, jax.random.fold_in(noise, index))
        loss, correct = loss_of_batch(model, features, micro)
        return loss / total, correct / total

    def micro_step(carry: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, rows = micro
        (loss, correct), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, targets_by_rows(rows), index)
        return jax.tree.map(jnp.add, carry, (loss, correct, grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
    (loss, correct, grads), _ = jax.lax.scan(micro_step, zero, (jnp.arange(batch["tokens"].shape[0]), batch))

    grads = _masked(grads, fixed.mask)
    norm = optax.tree.norm(grads)
    updates, optimizer = make_optimizer(fixed.hyper, part.labels).update(grads, state.optimizer, state.trainable)
    updates = _masked(cast(Arrays, updates), fixed.mask)
    new = MemberState(cast(Arrays, optax.apply_updates(state.trainable, updates)), optimizer, state.alive)
    alive = state.alive & jnp.isfinite(loss) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state)
    return kept._replace(alive=alive), Metrics(loss, correct, norm, learning_rate(fixed.hyper, step))


def _masked(tree: Arrays, mask: Arrays | None) -> Arrays:
    return tree if mask is None else {name: a * mask[name] if name in mask else a for name, a in tree.items()}


# Summed loss, summed right predictions, and what the task's own metrics are computed from: `TaskModel.answers`, in the batch's order.
Evaluated = tuple[jax.Array, jax.Array, jax.Array | None]


def eval_step(part: Partition, trainable: Arrays, settings: Arrays, frozen: Arrays, batch: Batch) -> Evaluated:
    """What one member comes to over one batch (without a micro axis), no dropout."""
    count = batch["target_index"].shape[0]
    model, batch = cast(TaskModel, part.merge(trainable, settings, frozen, training=False)), targets_by_rows(batch)
    with starting_from(batch.get("prefix")):
        features = model.features(batch)
    answers = model.answers(features)
    answers = None if answers is None else in_order(batch, answers, count)
    return *loss_of_batch(model, features, batch), answers


def loss_of_batch(model: TaskModel, features: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed loss and right predictions: cross-entropy, or where a teacher said what is wanted (`target_values`), squared error."""
    if "target_values" in batch:
        return squared_error(model.readout()(features), batch["target_values"], batch["target_weights"])
    return cross_entropy(model.readout(), features, batch["target_ids"], batch["target_weights"])


@dataclasses.dataclass(eq=False)
class TraceCounter:
    """Wraps a function to count how often it is traced: under `jax.jit`, how often it is compiled."""

    function: Callable[..., Any]
    count: int = 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.function(*args)

    def check_once(self, name: str) -> None:
        """`RunError` if the function was traced more than once: some shape or constant changed between calls."""
        if self.count > 1:
            raise RunError(f"the {name} program was compiled {self.count} times; it must be compiled once a pack")


class Program:
    """A function that is compiled when it is first called, and never again.

    Args:
        function: of arrays and pytrees of them.
        name: what it is called in messages.
        carries: whether its first result takes the place of its first argument in the next call: it then reuses the buffers, and
            comes back in the same layout, which the compiler would else choose anew on a mesh.
        mesh: what it runs on; all other results are then whole on each device. None: wherever its arguments are.
        results: where they lie on the mesh instead.
        limit: bytes that it may take on a device, its arguments included; then what the host frees goes back to the system at once, too.
            None: whatever there is.
        options: of the compiler.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        carries: bool = False,
        mesh: Mesh | None = None,
        results: NamedSharding | None = None,
        limit: int | None = None,
        options: dict[str, str] | None = None,
    ):
        self.traces = TraceCounter(function)
        self._name = name
        self._carries = carries
        self._mesh = mesh
        self._rest = results or (None if mesh is None else replicated(mesh))
        self.limit = limit
        self._options = options
        self._compiled: Any = None

    def lower(self, *args: Any) -> Any:
        """The lowered program, to look at: its text, its memory analysis. Arguments may be shapes."""
        options = self._options
        with on_mesh(self._mesh):
            if not self._carries:
                return jax.jit(self.traces, out_shardings=self._rest, compiler_options=options).lower(*args)
            layouts = jax.tree.map(lambda a: getattr(a, "sharding", None), args[0])
            return jax.jit(self.traces, donate_argnums=0, out_shardings=(layouts, self._rest), compiler_options=options).lower(*args)

    def compiled_text(self) -> str:
        """The program as compiled, after its first call."""
        return self._compiled.as_text()

    def prepare(self, *args: Any) -> None:
        """Compiles it for such arguments, if it is not compiled yet.

        Raises:
            OutOfMemory: it would take more memory than `limit`.
        """
        if self._compiled is not None:
            return
        compiled = self.lower(*args).compile()
        release_freed_memory(at_once=self.limit is not None)
        needed = program_bytes(compiled)
        if self.limit is not None and needed is not None and needed > self.limit:
            raise OutOfMemory(f"the {self._name} program needs {size_text(needed)} on a device, of {size_text(self.limit)}")
        self._compiled = compiled

    def __call__(self, *args: Any) -> Any:
        """Calls it.

        Raises:
            OutOfMemory: it would take more memory than `limit`.
            RunError: some shape, dtype or sharding is not what it was compiled for.
        """
        self.prepare(*args)
        try:
            return self._compiled(*args)
        except (TypeError, ValueError) as error:
            raise RunError(f"the {self._name} program got arrays unlike those it was compiled for: {error}") from error


class PackPrograms:
    """The compiled programs of a pack, or of packs of one form: `train` and `evaluate`, each over all members, each compiled once.

    The base is an argument of both, never a constant, and is not returned. Member arrays are donated.

    Args:
        part: how the arrays make a model.
        data_seed: of the base's own dropout.
        mesh: where the arrays lie; None where that is one device.
        mode: how the programs run the members.
        limit: bytes that each may take on a device.
    """

    def __init__(self, part: Partition, data_seed: int = 0, mesh: Mesh | None = None, mode: PackMode = VMAP, limit: int | None = None):
        self.mode = mode
        self.in_mode = lambda other: PackPrograms(part, data_seed, mesh, other, limit)

        def train(state: MemberState, fixed: MemberFixed, frozen: Arrays, batch: Batch, step: jax.Array) -> tuple[MemberState, Metrics]:
            noise = jax.random.fold_in(jax.random.key(data_seed), step)
            return mode.over_members(lambda s, f: train_step(part, s, f, frozen, batch, step, noise), part, mesh)(state, fixed)

        def evaluate(trainable: Arrays, settings: Arrays, frozen: Arrays, batch: Batch) -> Evaluated:
            return mode.over_members(lambda t, s: eval_step(part, t, s, frozen, batch), part, mesh)(trainable, settings)

        options = compiler_options()
        self.train = Program(train, "training", carries=True, mesh=mesh, limit=limit, options=options)
        self.evaluate = Program(evaluate, "evaluation", mesh=mesh, limit=limit, options=options)

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self.train.traces.count + self.evaluate.traces.count

    def check(self) -> None:
        """`RunError` unless each program was compiled at most once."""
        self.train.traces.check_once("training")
        self.evaluate.traces.check_once("evaluation")
