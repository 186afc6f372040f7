"""Sites: the weights of a model that an adapter can be put on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from ..errors import InputError
from ..models.convolution import PointwiseConv
from ..models.experts import ExpertLinear
from ..models.layers import Embedding
from ..models.quantized import QuantizedExperts
from ..models.stack import Stack
from ..models.stored import Stored, StoredEmbedding, StoredLinear, weight_shape
from .contraction import GENERAL, kernel_axes, unfit, window_of
from .parameters import own_name

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted weight, or the same weight of every layer of a stack.

    Attributes:
        path: where its module stands in the model.
        kind: `linear`, `embedding`, `convolution` or `expert` (a linear layer for each expert of a mixture).
        name: the path as people write it, without the layer: `layers.attn.q_proj`.
        names: for each layer (one entry where it is not stacked) all names that targets are matched against, our own first:
            `("layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj")`.
        depth: how many layers are stacked in it; None where it is a single weight.
        weight: what the module calls its weight: `kernel` or `embedding`.
        experts: how many there are, at a site of that kind.
        inputs, outputs: features in and out (of an embedding: rows, width; of a convolution's inputs: those of all places of its kernel).
        stack: path of the `Stack` that runs it, if one does.
        biased: whether its module has a bias.
        lone: whether it is called `out` and stands beside no queries, keys or values: a model's head as a rule, not attention's.
        window: of a convolution, the sizes of its kernel: (height, width) as a rule.
        dilated: whether it is a convolution whose kernel has gaps.
    """

    path: Path
    kind: str
    name: str
    names: tuple[tuple[str, ...], ...]
    depth: int | None
    weight: str
    experts: int | None
    inputs: int
    outputs: int
    stack: Path | None
    biased: bool
    lone: bool = False
    window: tuple[int, ...] = ()
    dilated: bool = False


class SiteModule(nnx.Module):
    """What stands at a site in the place of the base's module, and holds that as `base`. Its class tells an adapted site.

    Args:
        base: the module that stood there.
        site: which one it is.
    """

    # `models.layers.project` then says where the rows of a gathered input are.
    takes_rows = True

    def __init__(self, base: nnx.Module, site: Site):
        self.base: Any = base
        self.kind = site.kind
        self.weight = site.weight

    def attend(self, query: jax.Array) -> jax.Array:
        """An embedding's output projection with the base's weights: an adapter on the embedding leaves it as it is (so does PEFT)."""
        return self.base.attend(query)

    def projection(self) -> Callable[[jax.Array], jax.Array]:
        """Likewise, as `models.layers.Embedding` has it."""
        return self.base.projection()

    @property
    def embedding(self) -> nnx.Param:
        """An embedding's weights, as the base has them."""
        return self.base.embedding


def logical_name(path: Iterable[Any], layer: int | str | None = None) -> str:
    """The path as people write it: a stack's inner `segments.N.block` is left out.

    >>> logical_name(("layers", "segments", 0, "block", "attn", "q_proj"), layer=3)
    'layers.3.attn.q_proj'
    """
    parts = [str(p) for p in path]
    out: list[str] = []
    while parts:
        if len(parts) >= 3 and parts[0] == "segments" and parts[2] == "block":
            out += [] if layer is None else [str(layer)]
            parts = parts[3:]
        else:
            out.append(parts.pop(0))
    return ".".join(out)


def adapted_paths(model: nnx.Module) -> set[Path]:
    """Where the adapted sites of a model are."""
    return {path for path, module in nnx.iter_modules(model) if isinstance(module, SiteModule)}


def parameter_name(path: Path, adapted: Collection[Path]) -> str:
    """A variable's logical name. At an adapted site the base's own parameters keep the names they had.

    Args:
        path: of the variable.
        adapted: `adapted_paths` of its model.

    >>> parameter_name(("base", "q_proj", "base", "kernel"), {("base", "q_proj")})
    'base.q_proj.kernel'
    """
    *owner, inner, name = path if len(path) > 1 else ("", *path)
    return logical_name((*owner, name) if tuple(owner) in adapted and inner == "base" else path)


def named_variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Logical name and variable, of all variables of a model."""
    adapted = adapted_paths(model)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            yield own_name(variable) or parameter_name(path, adapted), variable


def find_sites(model: nnx.Module) -> list[Site]:
    """All linear, embedding, convolution and expert weights of a model, in the model's order.

    Raises:
        InputError: the model bears adapters already.
    """
    modules: dict[Path, nnx.Module] = dict(nnx.iter_modules(model))
    if any(isinstance(m, SiteModule) for m in modules.values()):
        raise InputError("the model already has adapters: inject into the base.")
    sites = []
    for path, module in modules.items():
        shape = _weight_shape(module) if path else None
        if shape is None:
            continue
        kind, weight, leading, inputs, outputs = shape
        stack = next((path[:i] for i in range(len(path)) if isinstance(modules.get(path[:i]), Stack)), None)
        experts = leading.pop() if kind == "expert" else None
        depth = leading[0] if leading else None
        names = tuple(names_of(modules, path, i) for i in ([None] if depth is None else range(depth)))
        biased = getattr(module, "bias", None) is not None
        lone = path[-1] == "out" and not any((*path[:-1], name) in modules for name in _QUERIES)
        size = (inputs, outputs, stack, biased, lone, *window_of(module))
        sites.append(Site(path, kind, logical_name(path), names, depth, weight, experts, *size))
    return sorted(sites, key=lambda s: [(isinstance(p, str), str(p).zfill(6)) for p in s.path])


_QUERIES = ("query", "key", "value", "qkv", "q_proj", "k_proj", "v_proj", "qkv_proj")


def _weight_shape(module: nnx.Module) -> tuple[str, str, list[int], int, int] | None:
    """(kind, name of the weight, leading axes, inputs, outputs) of a module that can be a site, else None."""
    for kind, type_, weight, stacked in _SITE_TYPES:
        if not _runs_as(module, type_):
            continue
        shape = weight_shape(module, weight)
        if isinstance(module, GENERAL) and unfit(module):
            return None
        own, ins = kernel_axes(module) if isinstance(module, GENERAL) else ([0, 1], 1)
        leading = list(shape[: len(shape) - len(own)])
        sizes = [math.prod(shape[len(leading) + axis] for axis in axes) for axes in (own[:ins], own[ins:])]
        return (kind, weight, leading, sizes[0], sizes[1]) if len(leading) in stacked else None
    return None


def _runs_as(module: nnx.Module, type_: type[nnx.Module]) -> bool:
    """Whether a module computes what this type does: a subclass with a `__call__` of its own may compute anything of its weight."""
    same = all(getattr(type(module), m, None) is getattr(type_, m, None) for m in ("__call__", "attend"))
    return isinstance(module, type_) and (same or issubclass(type_, Stored))


# Kind, module, its weight, and how many axes the weight may have before its inputs and outputs.
_SITE_TYPES: tuple[tuple[str, type[nnx.Module], str, tuple[int, int]], ...] = (
    ("linear", nnx.Linear, "kernel", (0, 1)),
    ("expert", QuantizedExperts, "kernel", (1, 2)),
    ("linear", StoredLinear, "kernel", (0, 1)),
    ("embedding", StoredEmbedding, "embedding", (0, 1)),
    ("linear", nnx.LinearGeneral, "kernel", (0, 1)),
    ("linear", nnx.Einsum, "kernel", (0, 1)),
    ("convolution", nnx.Conv, "kernel", (0, 1)),
    ("convolution", PointwiseConv, "kernel", (0, 1)),
    ("embedding", nnx.Embed, "embedding", (0, 1)),
    ("embedding", Embedding, "embedding", (0, 1)),
    ("expert", ExpertLinear, "kernel", (1, 2)),
)


def passed_over(model: nnx.Module) -> dict[str, str]:
    """Name -> why not, of the modules with a weight that look like sites and are none."""
    found = {}
    for path, module in nnx.iter_modules(model):
        shape = _weight_shape(module)
        if shape is not None and path:
            continue
        if isinstance(module, nnx.ConvTranspose):
            why = "transposed convolutions are not supported"
        elif isinstance(module, GENERAL) and (reason := unfit(module)):
            why = reason
        elif shape is not None:
            why = "it is the whole model: put it into a module of yours, such as nnx.Sequential"
        elif (type_ := next((t for _, t, _, _ in _SITE_TYPES if isinstance(module, t)), None)) is not None:
            called = "has a __call__ of its own, and merging could compute something else"
            own = "is stacked twice" if _runs_as(module, type_) else called
            why = f"a subclass of nnx.{type_.__name__} that {own}" if type(module) is not type_ else f"nnx.{type_.__name__} that {own}"
        else:
            continue
        found[logical_name(path)] = why
    return found


def names_of(modules: dict[Path, nnx.Module], path: Path, layer: int | str | None) -> tuple[str, ...]:
    """All names of the module at `path`: our own, then that of the checkpoint it was loaded from.

    Args:
        modules: all of a model (`nnx.iter_modules`).
        layer: which, where it is stacked.
    """
    found = [logical_name(path, layer)]
    for cut in range(len(path) + 1):
        table = dict(getattr(modules.get(path[:cut]), "site_aliases", ()))
        alias = table.get(logical_name(path[cut:]))
        if alias is not None:
            found.append(alias.replace("{i}", str(layer)))
    return tuple(found)


# What transformers calls the last layer of a head.
_HEAD_ALIASES = {"score": "classifier", "qa_outputs": "classifier"}


def modules_named(model: nnx.Module, name: str) -> tuple[str, ...]:
    """Our names, without layers, of the modules that a name means, as in a list of targets; Hugging Face's names do as well.

    Args:
        model: with or without adapters.
        name: the end of a path, cut at a dot; layers left out, for a stack's layers train together.

    Returns:
        `name` itself where it is one of ours, `attn.q_proj` for BERT's `query`; nothing where no module is called so.
    """
    modules = dict(nnx.iter_modules(model))
    found: dict[str, None] = {}
    for path in modules:
        own, *others = names_of(modules, path, "{i}")
        if ends_with(logical_name(path), name) or ends_with(own, name):
            return (name,)
        for other in others:
            parts = other.replace("{i}.", "").split(".")
            # A name may mean a module around several of ours.
            if any(ends_with(".".join(parts[:i]), name) for i in range(1, len(parts) + 1)):
                found[logical_name(path)] = None
    if not found and _HEAD_ALIASES.get(name) in {logical_name(path) for path in modules}:
        return (_HEAD_ALIASES[name],)
    return tuple(found)


def ends_with(name: str, end: str) -> bool:
    """Whether a path ends so, cut at a dot.

    >>> ends_with("layers.0.attn.out", "attn.out"), ends_with("layers.0.attn.out", "n.out")
    (True, False)
    """
    return name == end or name.endswith("." + end)
