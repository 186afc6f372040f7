"""How one compiled program runs the members of a pack: side by side, one after the other, or some at a time; and the cache on disk
that keeps programs from one process to the next."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..adapters.methods.base import method_of
from ..adapters.partition import Arrays, Partition, even_members, member_shardings
from ..config.schema import Config
from ..errors import InputError
from ..parallel.program import Program, compiler_options
from ..tasks.objectives import Objective, cross_entropy
from ..tasks.on_policy import OnPolicy
from ..training.step import Batch, Evaluated, MemberFixed, MemberState, Metrics, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class PackMode:
    """How many members a device runs side by side (`jax.vmap`); a loop in the program runs over the rest.

    Side by side, members fill the device, and all their activations are in memory at once. One after the other, they need the memory of
    a single member, and no member affects another, not even by rounding.

    Attributes:
        width: members at a time on each device of the `sweep` axis; None: all of them.
    """

    width: int | None = None

    @property
    def name(self) -> str:
        """`vmap`, `scan`, or such as `chunks of 4`."""
        return "vmap" if self.width is None else "scan" if self.width == 1 else f"chunks of {self.width}"

    def over_members(self, function: Callable[..., Any], part: Partition, mesh: Mesh | None) -> Callable[..., Any]:
        """Turns a function of one member's trees into a function of stacked trees, (members, ...).

        If the members do not divide evenly, the last is repeated, and the repeated results are dropped.

        Args:
            function: from trees to a tree.
            part: determines the sharding of the members' arrays.
            mesh: of the arrays; None for a single device.
        """
        devices = 1 if mesh is None else mesh.shape["sweep"]
        vmapped = jax.vmap(function, spmd_axis_name=None if mesh is None else "sweep")

        def run(*trees: Any) -> Any:
            members = len(jax.tree.leaves(trees)[0])
            own = -(-members // devices)
            rounds = -(-own // (self.width or own))
            size = -(-own // rounds)
            even = even_members(part, mesh, trees, devices * rounds * size)
            if self.width is None:
                results = vmapped(*even)
            else:
                one = size * devices == 1

                def at(index: jax.Array) -> Any:
                    taken = jax.tree.map(lambda a: a[index], cut)
                    return jax.tree.map(lambda a: a[None], function(*(jax.tree.map(lambda a: a[0], taken)))) if one else vmapped(*taken)

                cut = _cut(part, mesh, even, devices, rounds)
                results = jax.tree.map(lambda a: _joined(a, devices), jax.lax.map(at, jnp.arange(rounds)))
            return jax.tree.map(lambda a: a[:members], results)

        return run


def _cut(part: Partition, mesh: Mesh | None, tree: Any, devices: int, rounds: int) -> Any:
    """(members, ...) as (rounds, members of a round, ...): each round takes equally many from each device's members.

    Sizes are written out, because an array may be empty (LoKr has none of the factors it does without), and then -1 stands for none.
    """

    def leaf(a: jax.Array) -> jax.Array:
        size = a.shape[0] // (devices * rounds)
        grouped = a.reshape(devices, rounds, size, *a.shape[1:])
        return jnp.swapaxes(grouped, 0, 1).reshape(rounds, devices * size, *a.shape[1:])

    cut = jax.tree.map(leaf, tree)
    if mesh is None or devices == 1:
        return cut
    layouts = member_shardings(part, mesh, tree)
    return jax.lax.with_sharding_constraint(cut, jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), layouts))


def _joined(a: jax.Array, devices: int) -> jax.Array:
    """The inverse of `_cut`."""
    grouped = a.reshape(a.shape[0], devices, a.shape[1] // devices, *a.shape[2:])
    return jnp.swapaxes(grouped, 0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:])


VMAP, SCAN = PackMode(), PackMode(1)


class PackPrograms:
    """The compiled programs of a pack, or of packs of one program key: `train` and `evaluate`, each over all members, each compiled once.

    The base is an argument of both, never a constant, and is not returned. Member arrays are donated.

    Args:
        part: makes a model of the arrays.
        data_seed: for the base's own dropout.
        mesh: of the arrays; None for a single device.
        mode: how the programs run the members.
        limit: bytes that each program may take on a device.
        objective: the loss, or how members make batches and learn of them.
    """

    def __init__(
        self,
        part: Partition,
        data_seed: int = 0,
        mesh: Mesh | None = None,
        mode: PackMode = VMAP,
        limit: int | None = None,
        objective: Objective | OnPolicy = cross_entropy,
    ):
        self.mode = mode
        self.in_mode = lambda other: PackPrograms(part, data_seed, mesh, other, limit, objective)

        def train(state: MemberState, fixed: MemberFixed, frozen: Arrays, batch: Batch, step: jax.Array) -> tuple[MemberState, Metrics]:
            dropout_rng = jax.random.fold_in(jax.random.key(data_seed), step)

            def one(state: MemberState, fixed: MemberFixed) -> tuple[MemberState, Metrics]:
                return train_step(part, objective, state, fixed, frozen, batch, step, dropout_rng)

            return mode.over_members(one, part, mesh)(state, fixed)

        def evaluate(trainable: Arrays, settings: Arrays, frozen: Arrays, batch: Batch) -> Evaluated:
            return mode.over_members(lambda t, s: eval_step(part, objective, t, s, frozen, batch), part, mesh)(trainable, settings)

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


def configured_mode(config: Config) -> PackMode | None:
    """The mode that a config names, or its method needs; None where it is yet to be chosen."""
    training = config.training
    auto = None if why_scanned(config) is None else SCAN
    return {"auto": auto, "vmap": VMAP, "scan": SCAN, "chunk": PackMode(training.chunk)}[training.pack]


def why_scanned(config: Config) -> str | None:
    """Why a pack is scanned though its config leaves the mode open, in a sentence; None where it need not be."""
    if config.training.pack != "auto" or method_of(config.adapter).packs != "weight-sized":
        return None
    return (
        f"Each member of '{config.adapter.method}' needs arrays as large as the weights it adapts, so the members run one after the other "
        "in the memory of one (training.pack: vmap or chunk for another mode)."
    )


# The folder below `tracking.dir` that the runs there share, and how large it gets before the least recently used programs go.
CACHE_FOLDER = ".jax-cache"
_CACHE_BYTES = 2 * 10**9


@contextlib.contextmanager
def compile_cache(config: Config) -> Iterator[None]:
    """Context in which JAX keeps compiled programs on disk and reuses them: the same program, the same bits.

    JAX's own threshold applies: programs that compile in less than a second are not kept. A damaged entry is compiled again, with a
    warning. Nothing changes if `tracking.compile_cache` is false or JAX already has a cache (`JAX_COMPILATION_CACHE_DIR`).
    """
    if not config.tracking.compile_cache or jax.config.values.get("jax_compilation_cache_dir") is not None:
        yield
        return
    values = {
        "jax_compilation_cache_dir": str(Path(config.tracking.dir).absolute() / CACHE_FOLDER / _host()),
        "jax_compilation_cache_max_size": _CACHE_BYTES,
    }
    before = {name: getattr(jax.config, name) for name in values}
    cache = Path(str(values["jax_compilation_cache_dir"]))
    made = [folder for folder in (cache, *cache.parents[:2]) if not folder.exists()]
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        reset_cache()  # JAX looks once in a process whether it has a cache
        yield
    except InputError:
        # Wrong input leaves nothing behind that was not there before.
        if made:
            shutil.rmtree(made[0], ignore_errors=True)
        for folder in made[1:]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def _host() -> str:
    """A name for this kind of processor. JAX's cache keys do not distinguish them, and a program for one may not run on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *facts]).encode()).hexdigest()[:8]
