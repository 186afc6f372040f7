"""The trunk: the layers below the lowest adapted one. All members of a pack share its output, which is computed once a batch.

It is a program of its own, and the training step takes its output as part of the batch. So it is computed once however the members
are run (side by side, one after the other), nothing below it is differentiated, and it may come from a store, with the same bits. An
example's activations depend on its own tokens (and which of two texts each is of) alone, so that a batch of any composition is put
together from stored ones. Files are whole or absent, and never take more than a limit in all. A file's name is its key and the CRC-32
of its content: two processes that write the same file replace it by itself, and a damaged one is recognized.
"""

from __future__ import annotations

import contextlib
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from ..adapters.partition import Arrays, Partition
from ..data.batching import Examples
from ..models.heads import TaskModel
from ..models.stack import cut_of
from ..parallel.constraints import row_sharding
from ..parallel.program import Program
from .step import Batch


class TrunkStore:
    """The activations of some examples.

    Args:
        examples: equal ones are kept once.
        width: numbers a token.
        dtype: of the numbers.

    Attributes:
        tokens: how many are kept, padding not counted.
        pairs: whether the examples are pairs of texts.
        nbytes: size of the activations.
        hits, misses: batches that were put together from it, and that could not be.
    """

    def __init__(self, examples: Examples, width: int, dtype: np.dtype):
        self._where: dict[bytes, int] = {}
        self.tokens = 0
        self.pairs, self._spans = examples.types is not None, examples.spans
        for name, length in examples.named():
            if name not in self._where:
                self._where[name] = self.tokens
                self.tokens += length
        self.width, self.dtype = width, np.dtype(dtype)
        self.nbytes = self.tokens * width * self.dtype.itemsize
        self.hits = self.misses = 0
        self._rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, width) of the activations."""
        return self.tokens, self.width

    def names(self) -> Iterator[bytes]:
        """The examples as bytes, in the order they are kept in."""
        return iter(self._where)

    def use(self, rows: np.ndarray) -> None:
        """Keeps the activations in (or reads them from) an array of `shape`, of numbers as wide as `dtype`."""
        assert rows.shape == self.shape
        self._rows = rows.view(self.dtype)

    def put(self, batch: Mapping[str, np.ndarray], trunk: np.ndarray) -> None:
        """Takes the activations of a batch's examples, (..., rows, length, width)."""
        assert self._rows is not None
        flat = trunk.reshape(-1, self.width)
        for start, stop, name in self._spans(batch):
            at = self._where.get(name)
            if at is not None:
                self._rows[at : at + stop - start] = flat[start:stop]

    def get(self, batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """(..., rows, length, width): a batch's activations, 0 at padding; None if an example of it is not kept."""
        assert self._rows is not None
        flat = np.zeros((batch["segment_ids"].size, self.width), self.dtype)
        for start, stop, name in self._spans(batch):
            at = self._where.get(name)
            if at is None:
                self.misses += 1
                return None
            flat[start:stop] = self._rows[at : at + stop - start]
        self.hits += 1
        return flat.reshape(*batch["segment_ids"].shape, self.width)


_CHUNK = 1 << 24


class TrunkFiles:
    """The files of one folder.

    Args:
        folder: made when the first file is.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, key: str, shape: tuple[int, int], itemsize: int) -> np.ndarray | None:
        """The array of a key, (tokens, width) of unsigned integers, mapped read-only; None if there is none that is whole.

        A damaged file is removed.
        """
        for path in sorted(self.folder.glob(f"{key}-*.npy")):
            with contextlib.suppress(OSError, ValueError):
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                if rows.shape == shape and rows.dtype == _bits(itemsize) and path.stem == f"{key}-{_crc(rows)}":
                    os.utime(path)  # those used last are kept longest
                    return rows
            path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def write(self, key: str, shape: tuple[int, int], itemsize: int, *, limit: int) -> Iterator[np.ndarray]:
        """An array to be filled, (tokens, width) of unsigned integers; it becomes the key's file when the block ends well.

        The mapped array goes on being valid then. The files used longest ago make room.

        Args:
            key: names the file.
            shape, itemsize: of the array.
            limit: most bytes of the folder's files in all.

        Raises:
            OSError: no room on the disk, or no permission. Nothing is left behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._make_room(limit - file_size(shape, itemsize))
        part = self.folder / f".{key}.{socket.gethostname()}.{os.getpid()}.part"
        try:
            with open(part, "w+b") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": np.lib.format.dtype_to_descr(_bits(itemsize)), "fortran_order": False, "shape": shape}
                )
                offset = file.tell()
                _reserve(file.fileno(), offset, file_size(shape, itemsize))
            rows = np.memmap(part, _bits(itemsize), "r+", offset, shape)
            yield rows
            rows.flush()
            os.replace(part, self.folder / f"{key}-{_crc(rows)}.npy")
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, room: int) -> None:
        """Removes the files used longest ago until the rest is at most `room` bytes. Whoever has one mapped keeps it."""
        found = []
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _remove_leftovers(self) -> None:
        """What processes of this machine that were killed left behind."""
        for path in self.folder.glob(f".*.{socket.gethostname()}.*.part"):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (ValueError, PermissionError):
                continue


def file_size(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of a file that holds an array of this shape."""
    return 128 + shape[0] * shape[1] * itemsize  # NumPy's header of a small array


def _bits(itemsize: int) -> np.dtype:
    return np.dtype(f"<u{itemsize}")


def _crc(rows: np.ndarray) -> str:
    flat = rows.reshape(-1).view(np.uint8)
    crc = 0
    for start in range(0, flat.size, _CHUNK):
        crc = zlib.crc32(flat[start : start + _CHUNK].data, crc)
    return f"{crc:08x}"


def _reserve(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    os.lseek(descriptor, start, os.SEEK_SET)
    for at in range(start, size, _CHUNK):
        os.write(descriptor, bytes(min(_CHUNK, size - at)))


HostBatch = Mapping[str, np.ndarray]


def trunk_depth(part: Partition, micro: Mapping[str, Any]) -> int:
    """How many layers at the bottom of a pack are the same for all its members; 0 where none is.

    That no member's arrays are used below the cut is read off the traced computation: adapters on the embedding, trained biases and
    norms of lower layers, or full training leave nothing to share. (Nor does a cut at layer 0: an embedding is looked up as fast as
    it is kept.)

    Args:
        part: of the pack.
        micro: one micro-batch, of arrays or shapes.
    """
    depth = cut_of(part.merge(part.trainable, part.settings, part.frozen, training=True))
    if not depth:
        return 0
    jaxpr = trace_trunk(part, micro)
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return 0 if any(used[: len(jax.tree.leaves((part.trainable, part.settings)))]) else depth


def trace_trunk(part: Partition, micro: Mapping[str, Any]) -> ClosedJaxpr:
    """What enters the lowest cut of a pack's model, as JAX traces it. Arguments: the members' arrays, one micro-batch, the base."""
    own = (part.trainable, part.settings)
    return jax.make_jaxpr(lambda own, micro, frozen: _run(part, own, frozen, micro, None))(own, micro, part.frozen)


class Trunk:
    """The trunk of packs that are cut at the same layer.

    Args:
        part: of one of them.
        depth: `trunk_depth` of it.
        data_seed: of the base's own dropout.
        mesh: where the arrays lie.

    Attributes:
        stores: what is kept of it (`trunk_cache.py`), for training steps and for evaluations.
        asked_to_keep: whether it was seen to that something is.
    """

    def __init__(self, part: Partition, depth: int, data_seed: int, mesh: Mesh):
        self.depth = depth
        self.stores: tuple[TrunkStore, TrunkStore] | None = None
        self.asked_to_keep = False
        self._mesh = mesh
        self._frozen = part.frozen
        own = (part.trainable, part.settings)  # the model is made with them, and the program drops them: it makes no use of them

        def of_step(frozen: Arrays, batch: Batch, step: jax.Array) -> jax.Array:
            dropout_rng = jax.random.fold_in(jax.random.key(data_seed), step)
            micros = (jnp.arange(batch["segment_ids"].shape[0]), batch)
            return jax.lax.map(lambda m: _run(part, own, frozen, m[1], jax.random.fold_in(dropout_rng, m[0])), micros)

        def of_held_out(frozen: Arrays, batch: Batch) -> jax.Array:
            return _run(part, own, frozen, batch, None)

        # Compiled as XLA would by itself: `compiling.py`'s options make a row's last bits depend on its place, and no cache can be.
        self._step = Program(of_step, "trunk", mesh=mesh, results=row_sharding(mesh, 1))
        self._held_out = Program(of_held_out, "held-out trunk", mesh=mesh, results=row_sharding(mesh, 0))

    def of_step(self, step: int, batch: Batch, host: HostBatch | None = None) -> jax.Array:
        """(micro-batches, rows, length, width): what enters layer `depth` in training step `step`, dropout of the base included.

        Args:
            step: 0-based.
            batch: on the mesh.
            host: the same on the host, to be looked up in what is kept.
        """
        kept = self._kept(0, host)
        return self._step(self._frozen, batch, jnp.int32(step)) if kept is None else kept

    def of_held_out(self, batch: Batch, host: HostBatch | None = None) -> jax.Array:
        """(rows, length, width): what enters layer `depth` in an evaluation; arguments as in `of_step`."""
        kept = self._kept(1, host)
        return self._held_out(self._frozen, batch) if kept is None else kept

    def _kept(self, which: int, host: HostBatch | None) -> jax.Array | None:
        kept = self.stores[which].get(host) if self.stores is not None and host is not None else None
        return None if kept is None else jax.device_put(kept, row_sharding(self._mesh, 1 - which))

    def layout(self, batch: Batch) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `of_step`; nothing is compiled."""
        return jax.eval_shape(self._step.traces.function, self._frozen, batch, jnp.int32(0))

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._step.traces.count + self._held_out.traces.count


def _run(part: Partition, own: tuple[Arrays, Arrays], frozen: Arrays, micro: Batch, dropout_rng: jax.Array | None) -> jax.Array:
    model = cast(TaskModel, part.merge(*own, frozen, training=dropout_rng is not None))
    return model.trunk(micro, dropout_rng)
