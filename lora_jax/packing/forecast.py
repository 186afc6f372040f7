"""What a pack will take on each device, before anything is loaded: from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ..adapters.inject import inject_layout
from ..adapters.layout import Layout, resolve, unite
from ..adapters.partition import Arrays, Partition, partition, trainable_spec
from ..config.schema import Config
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.layers import BlockConfig
from ..models.load import BaseFiles
from ..parallel.mesh import AXES, mesh_sizes, parameter_sharding
from ..tasks.base import task_of
from ..tasks.objectives import CHUNK_FLOATS


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter will lie. `bytes` are those on one device; of a trained one, of all members that lie there."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    trained: bool
    bytes: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What one device will hold.

    Attributes:
        mesh: axis -> devices.
        members: how many train at once.
        placements: every parameter's.
        memory: what for -> bytes, of a training step at its fullest.
    """

    mesh: dict[str, int]
    members: int
    placements: list[Placement]
    memory: dict[str, int]

    @property
    def devices(self) -> int:
        """How many the mesh needs."""
        return math.prod(self.mesh.values())

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())


def forecast(configs: Sequence[Config], devices: int) -> Forecast:
    """What a pack needs; headers and config of the model are read, its weights and the data are not.

    Rows are taken to be as long as `task.max_length` allows, so that the activations are at most what is told, but for what the
    compiler adds. A classification's classes are two unless `task.labels` says otherwise.

    Args:
        configs: members of one pack.
        devices: how many there are, for a mesh axis of -1. More may be asked for.

    Raises:
        InputError: the model or the adapters will not do, or a mesh axis has no value.
    """
    config = configs[0]
    mesh = AbstractMesh(mesh_sizes(config.mesh, devices), AXES)
    head = task_of(config.task).loaded_head(config.task)
    base = BaseFiles(config.model.source, dtype=config.model.dtype, head=head).base
    part, structure = _parts(base, configs)
    sizes = dict(mesh.shape)
    members = -(-len(configs) // sizes["sweep"])
    placements = [_placement(part, mesh, name, a, 1) for name, a in part.frozen.items()]
    placements += [_placement(part, mesh, name, a, members) for name, a in part.trainable.items()]
    frozen = sum(p.bytes for p in placements if not p.trained)
    trained = sum(p.bytes for p in placements if p.trained)
    memory = {"frozen weights": frozen, "trained arrays, gradients and Adam's two moments": 4 * trained}
    if sizes["fsdp"] > 1:
        memory["one layer's weights, gathered"] = _gathered(part, sizes)
    return Forecast(sizes, len(configs), placements, memory | _activations(base, config, structure, sizes, members))


def _parts(base: Encoder | Decoder, configs: Sequence[Config]) -> tuple[Partition, Layout]:
    """The adapted model in parts, of shapes."""
    found: list[tuple[Partition, Layout]] = []

    def build(base: Encoder | Decoder) -> None:
        section, task = configs[0].task, task_of(configs[0].task)
        model = task.model(section, base, task.named_classes(section) or ("", ""))
        structure = unite(model, [resolve(model, c.adapter) for c in configs])
        part = partition(inject_layout(model, structure))
        shapes = {f: jax.tree.map(_shape, getattr(part, f)) for f in ("trainable", "settings", "frozen")}
        found.append((dataclasses.replace(part, **shapes), structure))

    nnx.eval_shape(build, base)
    return found[0]


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _placement(part: Partition, mesh: Any, name: str, array: Any, members: int) -> Placement:
    trained = name in part.trainable
    axes = part.axes.get(name, (None,) * len(array.shape))
    spec = trainable_spec(part, name, mesh) if trained else parameter_sharding(mesh, array.shape, axes).spec
    shard = NamedSharding(mesh, spec).shard_shape(array.shape)
    size = math.prod(shard) * np.dtype(array.dtype).itemsize
    return Placement(name, array.shape, str(array.dtype), spec, trained, members * size)


def _gathered(part: Partition, sizes: dict[str, int]) -> int:
    """Bytes of one layer's weights while they are in use, or of the vocabulary's projection if that is more."""

    def used(arrays: Arrays, stacked: bool) -> list[int]:
        chosen = [(a, part.axes[n]) for n, a in arrays.items() if n in part.axes and (part.axes[n][0] == "layers") == stacked]
        return [a.size * a.dtype.itemsize // (a.shape[0] if stacked else 1) // _cut(axes, sizes) for a, axes in chosen]

    arrays = part.frozen | part.trainable
    return max(sum(used(arrays, True)), max(used(arrays, False), default=0))


def _cut(axes: Sequence[str | None], sizes: dict[str, int]) -> int:
    return sizes["tensor"] if any(axis in ("heads", "kv_heads", "mlp", "vocab") for axis in axes) else 1


def _activations(base: Encoder | Decoder, config: Config, structure: Layout, sizes: dict[str, int], members: int) -> dict[str, int]:
    """Layer inputs and what the rematerialisation keeps of each layer, one layer's own, and a chunk of the loss; bytes."""
    block = base.config.block
    width = np.dtype(block.dtype).itemsize
    groups = sizes["data"] * sizes["fsdp"]
    rows = -(-config.training.batch_size // config.training.accumulate // groups)
    length = -(-config.task.max_length // 8) * 8
    tokens = members * rows * length
    layer = layer_floats(block, tokens, length) * width
    stacked = [s.first for s in structure.sites if s.site.stack is not None]
    depth = base.config.depth - (min(stacked) if stacked else 0)
    kept = {"full": 0, "dots": _dot_floats(block, tokens, length) * width, "none": layer}[config.model.remat]
    task = task_of(config.task)
    targets = tokens if task.targets is None else task.targets * members * rows
    return {
        "layers' inputs and what is kept of them": depth * (tokens * block.width * width + kept),
        "one layer's activations": layer,
        "a chunk of the loss": 4 * 3 * min(members * CHUNK_FLOATS, targets * task.outputs(config.task, base, length)),
    }


def layer_floats(block: BlockConfig, tokens: int, length: int) -> int:
    """Numbers that one layer computes on the way: norms, residuals, projections, attention's scores and shares, hidden units."""
    inner, kv = block.heads * block.head_dim, block.kv_heads * block.head_dim
    hidden = (3 if block.gated else 2) * block.hidden + (0 if block.experts is None else 3 * block.width)
    return tokens * (6 * block.width + 2 * inner + 4 * kv + 3 * block.heads * length + block.experts_used * hidden)


def _dot_floats(block: BlockConfig, tokens: int, length: int) -> int:
    """Numbers that come out of a layer's matrix products; of experts', which are computed anew, none are kept."""
    inner, kv = block.heads * block.head_dim, block.kv_heads * block.head_dim
    hidden = 0 if block.experts is not None else (2 if block.gated else 1) * block.hidden
    return tokens * (2 * inner + 2 * kv + 2 * block.width + block.heads * length + hidden)
