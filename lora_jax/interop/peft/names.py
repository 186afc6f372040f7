"""What PEFT calls a model's modules and parameters, and where they are here.

PEFT's names are Hugging Face's, from the root of the PyTorch model: `bert.encoder.layer.0.attention.self.query` where BERT bears a
head, without `bert.` where it does not. A stacked weight of ours is one of theirs in every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...adapters.methods.peft_form import PeftForm
from ...adapters.parameters import is_base
from ...adapters.sites import Path, Site, find_sites, logical_name, names_of
from ...adapters.targets import HEADS
from ...models.encoder import Encoder
from ...models.encoder_decoder import Base
from ...models.families import find_family
from ...models.families.base import Weight, oriented, torch_oriented
from ...models.heads import Classifier
from ...models.stack import Stack
from ...models.vision import VisionBase
from ..export import head_of

ROOT = "base_model.model."  # what PEFT puts before every name
SHARED = "base_model."  # what stands before a tensor that belongs to no module
PROJECTION = "lm_head"  # what transformers' modules call a decoder's projection to its vocabulary; GPT-NeoX's files say `embed_out`

# The embedding that an encoder-decoder's two stacks have in common. In transformers each has a module of its own with this one's weight,
# and no module of PEFT's in this one's place is ever called.
SHARED_TABLE = "shared"

# The parameters of a mixture's module, in its order.
_EXPERTS = ("gate_up_proj", "down_proj")

_KINDS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Module:
    """What can bear an adapter in PEFT: a module, or a parameter of a module of another kind (`target_parameters`).

    Attributes:
        name: from the root of the PyTorch model; a parameter's own name where it is one.
        site: the stacked weight of ours that it is a layer of.
        layer: which layer; 0 where it is not stacked.
        conv1d: whether it is GPT-2's `Conv1D`, whose weight has the axes of ours.
    """

    name: str
    site: Site
    layer: int
    conv1d: bool = False

    @property
    def parameter(self) -> bool:
        """Whether it is a parameter: a mixture's experts are 3-D ones, and its router is no `nn.Linear`."""
        return self.site.kind == "expert" or self.site.name.rsplit(".", 1)[-1] == "router"

    @property
    def linear(self) -> bool:
        """Whether `all-linear` means it: not an embedding, nor an output head."""
        return self.site.kind == "linear" and self.site.names[0][0].rsplit(".", 1)[-1] not in HEADS

    def stem(self, adapted: Collection[str]) -> str:
        """What the keys of its tensors begin with, up to the dot.

        Args:
            adapted: names of all that bear an adapter: of two parameters in one module the later is wrapped around the earlier.
        """
        owner, _, own = self.name.rpartition(".")
        stem = ROOT + (owner if self.parameter else self.name)
        if self.site.kind == "expert":
            stem += ".base_layer" * sum(f"{owner}.{later}" in adapted for later in _EXPERTS[_EXPERTS.index(own) + 1 :])
        return stem


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of PEFT's weights of the base.

    Attributes:
        name: from the root of the PyTorch model, `.weight` or `.bias` last.
        module: our name of the module it belongs to, without layers.
        variable: holds it.
        layer: which part of it; None where it is not stacked.
        transpose: whether PyTorch's axes are the other way round.
    """

    name: str
    module: str
    variable: nnx.Variable
    layer: int | None
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """PyTorch's."""
        shape = tuple(self.variable.shape if self.layer is None else self.variable.shape[1:])
        return torch_oriented(self.name, shape) if self.transpose else shape

    def read(self) -> np.ndarray:
        """Its value, in PyTorch's axes."""
        array = np.asarray(self.variable[...] if self.layer is None else self.variable[...][self.layer])
        return array.transpose(torch_oriented(self.name, range(array.ndim))) if self.transpose else array

    def write(self, value: np.ndarray) -> None:
        """Sets it to a value in PyTorch's axes, rounded to the weight's dtype."""
        value = value.transpose(oriented(self.name, range(value.ndim))) if self.transpose else value
        array = np.array(self.variable[...])
        array[... if self.layer is None else self.layer] = value
        self.variable.set_value(jnp.asarray(array))


@dataclasses.dataclass(frozen=True)
class Renaming:
    """From a family's names to those from the root of a PyTorch model: `drop` goes from the start, then `put` comes there."""

    drop: str = ""
    put: str = ""

    def __call__(self, name: str) -> str:
        return self.put + name.removeprefix(self.drop)


def module_of_key(key: str, prefix: str) -> str | None:
    """The module that a tensor of the file belongs to; None where it is not an adapter's, whose names begin with a prefix."""
    module, found, _ = key.removeprefix(ROOT).partition(f".{prefix}")
    return module if key.startswith(ROOT) and found else None


def tensor_key(form: PeftForm, stem: str, name: str, number: int) -> str:
    """The key of a module's tensor in a file.

    Args:
        form: the method's.
        stem: the module's (`Module.stem`).
        name: of the tensor.
        number: of the module among the adapted ones (`PeftNames.in_order`).
    """
    return f"{SHARED}{name}.{number}" if name in form.numbered else f"{stem}.{name}"


def trained_key(form: PeftForm, name: str) -> str:
    """The key of a weight of the base that a type trains as it is (`PeftForm.modules`), which PEFT has a copy of."""
    module, _, kind = name.rpartition(".")
    return f"{ROOT}{module}.{form.prefix}{kind}"


def unfit(form: PeftForm, module: Module) -> str | None:
    """Why PEFT would not compute the same at a convolution; None where it would, and of every other module."""
    if module.site.kind != "convolution":
        return None
    if not form.convolutions:
        return f"{module.name} is a convolution, which PEFT's type {form.peft_type} does not adapt"
    return f"{module.name} is a convolution with dilation, which PEFT leaves out of its A" if module.site.dilated else None


class PeftNames:
    """PEFT's names for a model without adapters.

    Args:
        model: a base, or one with a head.
        found: names of modules as a file has them, which say whether the PyTorch model bears a head; by default it does where ours does.
        renaming: what they said, where that is known already.

    Attributes:
        modules: all that can bear an adapter, by name.
        parameters: all weights, by name.
    """

    def __init__(self, model: nnx.Module, found: Iterable[str] = (), renaming: Renaming | None = None):
        self._modules = dict(nnx.iter_modules(model))
        self._tables: dict[Path, dict[str, Weight]] = {}
        own = {name: (site, i) for site in find_sites(model) for i, name in enumerate(self._site_names(site))}
        self.renaming = renaming or _renaming(model, list(own), list(found))
        self.modules: dict[str, Module] = {}
        for name, (site, layer) in own.items():
            if site.kind == "embedding" and name.rpartition(".")[2] == SHARED_TABLE:
                continue
            full = self._root(name, site.path)
            module = Module(full, site, layer, site.kind == "linear" and not self._weight((*site.path, "kernel")).transpose)
            if module.parameter and site.kind == "linear":
                module = dataclasses.replace(module, name=f"{full}.weight")
            self.modules[module.name] = module
        self.parameters = {p.name: p for p in self._parameters(model)}

    def in_order(self, names: Collection[str]) -> list[str]:
        """These modules as PyTorch's model has them: layer by layer, and in a layer as the family's table has its weights."""
        return sorted(names, key=lambda name: self._place(self.modules[name]))

    def _place(self, module: Module) -> tuple[int, ...]:
        path = (*module.site.path, module.site.weight)
        base = self._base_of(path)
        if base is None:  # heads come after the base
            return (1, 0, 0, list(self.modules).index(module.name))
        weights, own = list(self._table(base).values()), self._weight(path)
        if own not in weights:
            return (0, 0, module.layer, list(self.modules).index(module.name))
        index = weights.index(own)
        stacked = ["{i}" in weight.name for weight in weights[: index + 1]]
        return (0, sum(a != b for a, b in itertools.pairwise(stacked)), module.layer, index)

    def _site_names(self, site: Site) -> list[str]:
        kind = "embedding" if site.kind == "embedding" else "kernel"
        name = self._weight((*site.path, kind)).parameter.removesuffix(".weight")
        return [name.replace("{i}", str(i)) for i in range(len(site.names))]

    def _root(self, name: str, path: Path) -> str:
        """A name of the base's, from the root; a head's names are from there already."""
        return self.renaming(name) if self._base_of(path) is not None else name

    def _base_of(self, path: Path) -> Path | None:
        return next((path[:i] for i in range(len(path)) if isinstance(self._modules.get(path[:i]), Base)), None)

    def _table(self, path: Path) -> dict[str, Weight]:
        """The family's table for the base or the head at a path; empty where the base was not loaded from a checkpoint."""
        if path not in self._tables:
            module: Any = self._modules[path]
            if isinstance(module, Classifier):
                head = head_of(module)
                self._tables[path] = {} if head is None else head.weights()
            else:
                table = {} if module.origin is None else find_family(module.origin.config, module.origin.source).weights(module.config)
                projection = {k: dataclasses.replace(w, name=f"{PROJECTION}.weight") for k, w in table.items() if k == "lm_head.kernel"}
                self._tables[path] = table | projection
        return self._tables[path]

    def _parameters(self, model: nnx.Module) -> Iterable[Parameter]:
        for path, variable in nnx.iter_graph(model):
            if not is_base(variable) or path[-1] not in _KINDS:
                continue
            weight = self._weight(path)
            for layer in weight.layers(variable.shape[0]):
                name = self._root(weight.of_layer(layer), path)
                yield Parameter(name, logical_name(path[:-1]), variable, layer, weight.transpose)

    def _weight(self, path: Path) -> Weight:
        """The family's table, or else our own name with PyTorch's words for the parameter."""
        for cut in (path[:i] for i in range(len(path))):
            if isinstance(self._modules.get(cut), Base | Classifier):
                weight = self._table(cut).get(logical_name(path[len(cut) :]))
                if weight is not None:
                    return weight
        stacked = any(isinstance(self._modules.get(path[:i]), Stack) for i in range(len(path)))
        name = names_of(self._modules, path[:-1], "{i}" if stacked else None)[-1]
        return Weight(f"{name}.{_KINDS[path[-1]]}", transpose=path[-1] == "kernel")


def _renaming(model: nnx.Module, own: list[str], found: list[str]) -> Renaming:
    """How a file names the base's modules; with nothing found, as transformers does for a model with our head."""
    usual = Renaming()
    classifier = next((m for _, m in nnx.iter_modules(model) if isinstance(m, Classifier)), None)
    if classifier is not None and classifier.base.origin is not None:
        head = head_of(classifier)
        drop, put = (head and head.renamed) or ("", "")
        if isinstance(classifier.base, Encoder | VisionBase):
            put = find_family(classifier.base.origin.config, classifier.base.origin.source).prefixes[-1]
        usual = Renaming(drop, put)
    found_names = set(found)
    if any(usual(name) in found_names for name in own):
        return usual
    for name in found:
        for ours in own:
            if name.endswith("." + ours):
                return Renaming(put=name.removesuffix(ours))
            if ours.endswith("." + name):
                return Renaming(drop=ours.removesuffix(name))
    return usual
