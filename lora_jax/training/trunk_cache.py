"""`training.cache_trunk`: the trunk of every example, computed once and used in all epochs, evaluations and packs. And what a task keeps
of each example (`tasks.data.Shared`), in files (`keep_shared`).

It is filled before the first step, in one pass, and read-only from then on: in memory, or where that is too little, in a file that
later runs find again. Losses are, bit for bit, those of computing it anew. That takes a compiled program that gives an example the same
numbers wherever in a batch it lies. XLA promises no such thing, so it is checked: batches of the run, whose examples lie elsewhere than
they did when the cache was filled, are computed and compared before anything is taken from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import cast

import jax
import numpy as np

import lora_jax.models

from ..config.schema import TrainingConfig
from ..data.batching import BatchPlan
from ..data.examples import spans
from ..models.stack import stacks_of
from ..parallel.constraints import place_batch
from ..parallel.mesh import to_host
from ..weights.provenance import fingerprint
from .setup import Setup
from .shared import SharedProgram
from .trunk import Trunk, TrunkFiles, TrunkStore, file_size

# The trunks' folder, below `tracking.dir`: the runs there share it.
FOLDER = ".trunk-cache"

_GB = 1e9


def keep_trunk(trunk: Trunk, setup: Setup, training: TrainingConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Gives a trunk its cache, unless it has been through here.

    Where there can be none, or the disk is full, the trunk is computed in every step as without it.

    Args:
        trunk: of the setup's packs.
        setup: the data.
        training: the config's section.
        folder: where files go; made when one is written.
        say: hears what is kept, or why nothing is.
    """
    if trunk.asked_to_keep:
        return
    trunk.asked_to_keep = True
    if getattr(setup.base, "dropout", 0.0):
        return say("trunk cache: off, because the base's own dropout (model.dropout) changes the trunk in every step")
    if setup.data.train.varies:
        return say("trunk cache: off, because every epoch sees the training examples otherwise (they are augmented)")
    if jax.process_count() > 1:
        return say("trunk cache: off, because it works in a single process only, and the batches are split over several")
    batch = setup.plan.batch(0)
    layout = trunk.layout(place_batch(setup.mesh, batch, row_axis=1))
    seen, held_out = cast(BatchPlan, setup.plan).seen(), setup.data.held_out
    # Two programs, which may round differently: what one computed is not used for the other.
    stores = [TrunkStore(examples, layout.shape[-1], layout.dtype) for examples in (seen, held_out)]
    shape = (sum(s.tokens for s in stores), layout.shape[-1])
    size, itemsize = sum(s.nbytes for s in stores), stores[0].dtype.itemsize
    what = f"{trunk.depth} layers of {len(seen) + len(held_out):,} examples, {size / 1e6:,.1f} MB"
    fill = functools.partial(_fill, trunk, setup, stores)
    if size <= training.trunk_memory_gb * _GB:
        rows = np.empty(shape, f"u{itemsize}")
        if not fill(rows):
            return say(_MOVED)
        trunk.stores = (stores[0], stores[1])
        return say(f"trunk cache: {what} in memory")
    if file_size(shape, itemsize) > training.trunk_disk_gb * _GB:
        return say(f"trunk cache: off, because {what} is more than training.trunk_memory_gb and training.trunk_disk_gb allow")
    files, key = TrunkFiles(folder), _key(trunk, setup, stores, batch)
    found = files.open(key, shape, itemsize)
    if found is not None:
        _use(stores, found)
        trunk.stores = (stores[0], stores[1])
        return say(f"trunk cache: {what}, found in {folder}")
    try:
        with files.write(key, shape, itemsize, limit=int(training.trunk_disk_gb * _GB)) as rows:
            if not fill(rows):
                raise _MovedError
    except _MovedError:
        return say(_MOVED)
    except OSError as error:
        return say(
            f"warning: trunk cache: off, because {folder} cannot hold {size / 1e6:,.1f} MB ({error.strerror}); "
            "the trunk is computed for each batch"
        )
    trunk.stores = (stores[0], stores[1])
    say(f"trunk cache: {what} in {folder}")


_MOVED = "trunk cache: off, because on this device an example's numbers depend, in their last bits, on its place in the batch"


class _MovedError(Exception):
    """The check failed: nothing is to be kept."""


def keep_shared(setup: Setup, folder: Path, say: Callable[[str], None]) -> None:
    """Gives what a task computes once an example its files, where the task wants them: read if they are there, else computed and written.

    Args:
        setup: with what is shared.
        folder: `tracking.dir`. The files go into a folder of theirs in it, `.teacher-cache` of a teacher's.
        say: hears what is kept, or why nothing is.
    """
    shared = setup.shared
    if shared is None or not shared.once or not shared.disk_gb or shared.asked_to_keep:
        return
    shared.asked_to_keep = True
    what = shared.name.removeprefix("target_")
    if jax.process_count() > 1:
        return say(f"{what} cache: off, because it works in a single process only")
    held_out = [_Kept.of(setup, "held-out", cast(BatchPlan, setup.plan).eval_batches())] if shared.held_out else []
    parts = [_Kept.of(setup, "", [*setup.pass_over()]), *held_out]
    texts, total = sum(len(part.lengths) for part in parts), sum(file_size(part.shape, 4) for part in parts)
    size = f"{texts:,} texts, {total / 1e6:,.1f} MB"
    if total > shared.disk_gb * _GB:
        return say(f"{what} cache: off, because {size} is more than its disk_gb allows")
    files = TrunkFiles(folder / f".{what}-cache")
    found = [files.open(part.key, part.shape, 4) for part in parts]
    for number, (part, rows) in enumerate(zip(parts, found, strict=True)):
        if rows is not None:
            values = rows.view(np.float32).reshape(len(rows), *part.tail)
            cuts = np.split(values, np.cumsum([*part.lengths.values()])[:-1])
            shared.use(dict(zip(part.lengths, cuts, strict=True)), held_out=bool(number))
            continue
        known = shared.known_of(part.batches, held_out=bool(number))
        try:
            with files.write(part.key, part.shape, 4, limit=int(shared.disk_gb * _GB)) as rows:
                rows[...] = np.concatenate([known[name] for name in part.lengths]).reshape(part.shape).view(np.uint32)
        except OSError as error:
            return say(f"warning: {what} cache: none is kept, because {files.folder} cannot hold {size} ({error.strerror})")
    there = all(rows is not None for rows in found)
    say(f"{what} cache: {size}{', found' if there else ''} in {files.folder}")


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A file of what is computed once of each example of some batches.

    Attributes:
        batches: without a micro axis.
        lengths: name of a text -> its tokens, in the order of the file.
        shape: (tokens, numbers).
        tail: the shape of what is kept of a target.
        key: 32 hex digits of everything that the numbers follow from. Tokenizer, template and data are in the batches.
    """

    batches: list[dict[str, np.ndarray]]
    lengths: dict[bytes, int]
    shape: tuple[int, int]
    tail: tuple[int, ...]
    key: str

    @classmethod
    def of(cls, setup: Setup, part: str, batches: list[dict[str, np.ndarray]]) -> _Kept:
        shared = cast(SharedProgram, setup.shared)
        lengths: dict[bytes, int] = {}
        digest = hashlib.sha256(part.encode())
        for batch in batches:
            lengths |= {name: stop - start for start, stop, name in spans(batch)}
            for key in ("tokens", "positions", "segment_ids", "target_index", "target_ids", "target_weights", "token_types"):
                digest.update(key.encode() + (batch[key].tobytes() if key in batch else b"-"))
        own = getattr(shared.model, "base", shared.model)
        facts = {
            "model": [fingerprint(shared.model), type(shared.model).__name__, repr(getattr(own, "config", "")), shared.facts],
            "batches": digest.hexdigest(),
            "mesh": list(setup.mesh.shape.items()),
            "programs": _programs(),
        }
        tail = () if shared.numbers is None else (shared.numbers,)
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        return cls(batches, lengths, (sum(lengths.values()), shared.numbers or 1), tail, key)


def _use(stores: Sequence[TrunkStore], rows: np.ndarray) -> None:
    at = 0
    for store in stores:
        store.use(rows[at : at + store.tokens])
        at += store.tokens


def _fill(trunk: Trunk, setup: Setup, stores: Sequence[TrunkStore], rows: np.ndarray) -> bool:
    """Computes everything into `rows`; returns whether batches put together from it are, bit for bit, those that are computed."""
    _use(stores, rows)
    plan, mesh = cast(BatchPlan, setup.plan), setup.mesh

    def of_step(batch: dict[str, np.ndarray]) -> np.ndarray:
        return to_host(trunk.of_step(0, place_batch(mesh, batch, row_axis=1)))

    micros = plan.eval_batches(plan.seen())
    together = plan.batch(0)["segment_ids"].shape[0]
    for start in range(0, len(micros), together):
        chosen = (micros[start : start + together] * together)[:together]
        batch = {name: np.stack([m[name] for m in chosen]) for name in chosen[0]}
        stores[0].put(batch, of_step(batch))
    for batch in plan.eval_batches():
        stores[1].put(batch, to_host(trunk.of_held_out(place_batch(mesh, batch, row_axis=0))))
    same = True
    for step in sorted({0, plan.steps // 2, plan.steps - 1}):
        batch = plan.batch(step)
        kept = stores[0].get(batch)
        real = batch["segment_ids"] > 0
        same &= kept is not None and kept[real].tobytes() == of_step(batch)[real].tobytes()
    stores[0].hits = stores[0].misses = 0
    return same


def _key(trunk: Trunk, setup: Setup, stores: Sequence[TrunkStore], batch: dict[str, np.ndarray]) -> str:
    """32 hex digits of everything that the numbers follow from: base, examples, depth, shapes, and what computes them.

    The examples are their tokens, in which the data, the split, the tokenizer, the template and the greatest length have gone.
    """
    tokens = hashlib.sha256()
    for store in stores:
        tokens.update(bytes([store.pairs]) + store.tokens.to_bytes(8, "little"))
        for name in store.names():
            tokens.update(len(name).to_bytes(8, "little") + name)
    facts = {
        "base": [setup.fingerprint, type(setup.base).__name__, repr(setup.base.config)],
        "depth": trunk.depth,
        "scanned": [stack.scan for stack in stacks_of(setup.base)],
        "examples": tokens.hexdigest(),
        "batch": [batch["segment_ids"].shape, str(stores[0].dtype)],
        "mesh": list(setup.mesh.shape.items()),
        "programs": _programs(),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _programs() -> list[object]:
    """What decides how the compiled programs round: the models' code, JAX, the device."""
    code = hashlib.sha256()
    folder = Path(lora_jax.models.__path__[0])
    for path in sorted(folder.rglob("*.py")):
        code.update(path.read_bytes())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    settings = [jax.config.values.get(name) for name in ("jax_default_matmul_precision", "jax_disable_most_optimizations")]
    options = [os.environ.get("XLA_FLAGS", ""), *map(str, settings)]
    return [
        code.hexdigest(),
        version("jax"),
        version("jaxlib"),
        device.platform,
        device.device_kind,
        platform.machine(),
        model,
        cores,
        options,
    ]
