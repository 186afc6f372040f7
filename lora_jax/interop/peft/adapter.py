"""An adapted model as PEFT sees it: what it computes at each module, and what it trains beside them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from ...adapters.inject import LABEL, recall, site_modules
from ...adapters.labels import STATISTIC
from ...adapters.merge import plain, strip
from ...adapters.methods.base import AdaptedSite, Method
from ...adapters.sites import Site
from ...config.doors import METHODS
from ...errors import InputError
from ...models.encoder_decoder import Generative
from ..export import kind_of
from .config import form_of
from .names import Module, Parameter, PeftNames, Renaming, unfit


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """What a model computes at one module.

    Attributes:
        module: the module.
        layer: of the arrays in `held`.
        held: the site's module.
        rank: the least that holds all its numbers.
        settings: name -> float32.
    """

    module: Module
    layer: int
    held: AdaptedSite
    rank: int
    settings: dict[str, float]

    def arrays(self, rank: int) -> dict[str, np.ndarray]:
        """The method's arrays and settings at a rank, without padding."""
        found = {name: np.asarray(value, np.float32) for name, value in self.settings.items()}
        for name, parameter in self.held.method.parameters(self.module.site, rank).items():
            found[name] = _layer(self.held, name, self.layer, parameter.shape)[parameter.own]
        return found


def _layer(held: AdaptedSite, name: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """A layer of an array, padding and all; an array of the whole adapter has none."""
    array = np.asarray(getattr(held, name)[...])
    return array if array.ndim == len(shape) else array[layer]


class Adapter:
    """An adapted model as PEFT sees it.

    Attributes:
        method: of its sites.
        section: the config that it was adapted by; with the defaults where it is not known.
        foreign: what else the file that it was loaded from held; empty for an adapter made here.
        kind: of the model, as Hugging Face calls it.
        names: PEFT's names.
        sites: the modules with adapters.
        trained: label -> weights of the base.
        decoder: what predicts tokens in the model, if there is anything.
    """

    def __init__(self, model: nnx.Module):
        labels = (v.get_metadata().get(LABEL) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable))
        if STATISTIC in labels:
            raise InputError("model.train_batch_stats: the member has running statistics of its own, which no adapter of PEFT holds.")
        self.model = model = plain(model)
        record = recall(model)
        self.foreign: dict[str, Any] = json.loads(record.foreign) if record and record.foreign else {}
        self.kind = kind_of(model)
        base = strip(model)
        renaming = Renaming(*self.foreign["renaming"]) if self.foreign else None
        self.names = PeftNames(base, renaming=renaming)
        self.sites = _adapted_modules(model, self.names)
        known = None if record is None else json.loads(record.config)
        if self.sites:
            self.method: Method = self.sites[0].held.method
        elif known is None:
            raise InputError("the model has no adapter that PEFT could hold.")
        else:
            self.method = METHODS.get(known["method"], "adapter.method")
        self.form = form_of(self.method)
        if not self.sites and not self.form.modules:
            raise InputError("the model has no adapter that PEFT could hold.")
        if not self.form.conv1d and (odd := next((s.module.name for s in self.sites if s.module.conv1d), None)):
            raise InputError(f"{odd} is a Conv1D, which PEFT's type {self.form.peft_type} does not adapt.")
        if why := next((why for s in self.sites if (why := unfit(self.form, s.module))), None):
            raise InputError(f"{why}.")
        self.known = known is not None and known["method"] == self.method.name
        self.section: Any = self.method.section.model_validate(known if self.known else {})
        self.trained: dict[str, list[Parameter]] = {}
        for parameter in self.names.parameters.values():
            label = parameter.variable.get_metadata().get(LABEL, "frozen")
            self.trained.setdefault(label, []).append(parameter)
        self.decoder = next((m for _, m in nnx.iter_modules(base) if isinstance(m, Generative)), None)

    def whole(self, ranks: Mapping[Site, int]) -> dict[str, np.ndarray]:
        """The method's arrays of scope `adapter`, without padding.

        Args:
            ranks: each adapted site, with its largest rank.
        """
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for site, rank in ranks.items():
            for name, parameter in self.method.parameters(site, rank).items():
                if parameter.scope == "adapter":
                    shapes.setdefault(name, []).append(parameter.shape)
        return {
            name: np.asarray(getattr(self.sites[0].held, name)[...])[tuple(slice(max(sizes)) for sizes in zip(*each, strict=True))]
            for name, each in shapes.items()
        }

    @property
    def saved(self) -> list[Parameter]:
        """Weights of modules that were trained in full, a new head's among them; without those that the type is for."""
        own = {p.name for p in self.replaced}
        return [p for label in ("head", "saved", "full", "norm") for p in self.trained.get(label, []) if p.name not in own]

    @property
    def replaced(self) -> list[Parameter]:
        """Weights of the base that PEFT's type trains as they are; none of a type that adapts sites."""
        trained = (p for label in ("norm", "saved", "full") for p in self.trained.get(label, []))
        return [p for p in trained if self.form.modules and re.fullmatch(self.form.modules, p.module)]

    @property
    def shares_saved_embedding(self) -> bool:
        """Whether the vocabulary projection shares a trained embedding's weights. To PEFT they are two modules, each with its own copy."""
        decoder = self.decoder
        return decoder is not None and decoder.config.tied and any(p.variable is decoder.embed.embedding for p in self.saved)


def _adapted_modules(model: nnx.Module, names: PeftNames) -> list[AdaptedModule]:
    by_place = {(m.site.name, m.layer): m for m in names.modules.values()}
    found = []
    for name, held in site_modules(model).items():
        if (name, 0) not in by_place:
            raise InputError(f"{name}: PEFT adapts no embedding that the stacks of an encoder-decoder share.")
        first = len(by_place[name, 0].site.names) - len(held.ranks)
        settings = {n: np.atleast_1d(np.asarray(getattr(held, n)[...])) for n in held.method.setting_names}
        for i, rank in enumerate(held.ranks):
            own = {n: values[i] for n, values in settings.items()}
            if rank and own.get("scale", 1) != 0:
                found.append(AdaptedModule(by_place[name, first + i], i, held, _holding(held, i, rank), own))
    return sorted(found, key=lambda s: list(names.modules).index(s.module.name))


def _holding(held: AdaptedSite, layer: int, rank: int) -> int:
    """The least rank, from one on, that leaves nothing of a layer's arrays out: combined adapters say how many ranks are not 0."""
    while rank < held.rank:
        parameters = held.method.parameters(held.site, rank)
        left = False
        for name, parameter in parameters.items():
            if parameter.scope == "adapter":
                continue
            array = np.array(_layer(held, name, layer, parameter.shape))
            array[parameter.own] = parameter.fill
            left = left or bool((array != parameter.fill).any())
        if not left:
            return rank
        rank += 1
    return rank
