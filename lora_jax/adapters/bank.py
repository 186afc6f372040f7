"""Many adapters on one base: added by name, switched, left out, combined, and mixed within a batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.doors import METHODS
from ..errors import InputError, hint
from ..parallel.mesh import to_host
from .combine import Combination, Factors, factors_of, layouts_of
from .inject import LABEL, inject_layout, replace_sites, site_modules
from .layout import Layout, SiteLayout
from .merge import unmerge
from .methods.base import Method
from .mixed import MIXED_MODULES, NO_ADAPTER, with_rows
from .partition import Partition, partition
from .sites import Site, find_sites, named_variables


class AdapterBank:
    """Named adapters over one base, of which there is one copy however many adapters there are.

    Models of a bank share the base's arrays; an adapter takes memory only for its own arrays. The models are for inference (no
    dropout). They stay valid whatever happens to the bank later.

    Args:
        base: a model without adapters, with its task's head if it has one.

    Attributes:
        base: as given.

    >>> from lora_jax.config.schema import AdapterConfig
    >>> from lora_jax.adapters.inject import inject
    >>> base = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> bank = AdapterBank(base)
    >>> for seed, name in enumerate(["reviews", "letters"]):
    ...     bank.add(name, inject(base, AdapterConfig(targets="all-linear"), rngs=nnx.Rngs(seed)))
    >>> model = bank.use("letters")
    >>> with bank.disabled():
    ...     assert bank.model is base
    >>> bank.combine("both", {"reviews": 0.7, "letters": 0.3}, method="svd", rank=4)
    >>> bank.names
    ('reviews', 'letters', 'both')
    >>> mixed = bank.mixed(["letters", None, "both"])  # for a batch of three rows
    >>> mixed(jnp.ones((3, 4))).shape
    (3, 3)
    """

    def __init__(self, base: nnx.Module):
        self.base = base
        self._sites: list[Site] = find_sites(base)
        self._arrays = {name: v.get_value() for name, v in named_variables(base)}
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None
        self._disabled = False
        self._mixed: nnx.Module | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order they were added."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter in use; None for the base alone."""
        return None if self._disabled else self._active

    @property
    def model(self) -> nnx.Module:
        """The base with the adapter in use, or alone if there is none."""
        return self.base if self.active is None else self._adapters[self.active].model()

    def add(self, name: str, adapted: nnx.Module) -> None:
        """Adds the adapter of an adapted model: everything it trains, weights of the base included.

        Args:
            name: a new name.
            adapted: made by `inject` on this base or one of the same structure, merged or not. Only its trained arrays are kept; the frozen
                ones come from the bank's base.

        Raises:
            InputError: the name is taken, the model trains nothing, or its structure differs from the base's.
        """
        self._check_new(name)
        self._keep(name, unmerge(adapted))

    def remove(self, name: str) -> None:
        """Removes an adapter. If it is in use, the bank falls back to the base.

        Raises:
            InputError: there is no adapter of this name.
        """
        del self._adapters[self._known(name).name]
        self._mixed = None
        if self._active == name:
            self._active = None

    def use(self, name: str | None) -> nnx.Module:
        """Switches to an adapter (None: to the base) and returns `model`.

        Raises:
            InputError: there is no adapter of this name.
        """
        self._active = None if name is None else self._known(name).name
        return self.model

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nnx.Module]:
        """A context in which the bank's model is the base, and rows of mixed batches have no adapters."""
        before, self._disabled = self._disabled, True
        try:
            yield self.base
        finally:
            self._disabled = before

    def row_ids(self, rows: Sequence[str | None]) -> np.ndarray:
        """The adapter indices of the rows, for `with_rows`: (batch,) int32, -1 for no adapter.

        Raises:
            InputError: there is no adapter of a name, its method is not low-rank, or it trains weights of the base, of which a batch
                has only one copy.
        """
        numbers = {adapter.name: i for i, adapter in enumerate(self._mixable())}
        for name in dict.fromkeys(r for r in rows if r is not None):
            adapter = self._known(name)
            if not adapter.low_rank:
                raise InputError(
                    f"adapter '{name}': the change that its method '{adapter.method_name}' makes is not low-rank, and only those can be "
                    "mixed in a batch. Use it by itself: bank.use(name)."
                )
            if adapter.changed:
                raise InputError(
                    f"adapter '{name}': it trains weights of the base ({', '.join(sorted(adapter.changed)[:4])}), and the rows of a "
                    "batch share those. Use it by itself: bank.use(name)."
                )
        return np.array([NO_ADAPTER if r is None or self._disabled else numbers[r] for r in rows], np.int32)

    def mixed(self, rows: Sequence[str | None]) -> nnx.Module:
        """A model for a batch in which each row has its own adapter.

        The model holds all adapters that can be mixed. `with_rows` changes the rows, also inside a compiled function, without a new
        compilation. Adding or removing adapters changes the model's shapes.

        Args:
            rows: for each row of the batch an adapter's name, or None for the base alone.

        Raises:
            InputError: as in `row_ids`.
        """
        ids = self.row_ids(rows)
        if self._mixed is None:
            if not (adapters := self._mixable()):
                return self.base
            self._mixed = _mixed_model(self.base, self._sites, [a.factors for a in adapters])
        return with_rows(self._mixed, ids)

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        method: str = "linear",
        rank: int | None = None,
        density: float | None = None,
        majority: str | None = None,
        seed: int | None = None,
    ) -> None:
        """Adds a combination of adapters: of their weight updates, so the A of one never meets the B of another.

        `linear`: the exact weighted sum, at the rank it needs. `cat`: the same, with the factors concatenated and the ranks added.
        `svd`: the best approximation of the sum at a given rank (Eckart-Young). The other methods work on full updates and return the
        best approximation of the result: `magnitude_prune` keeps the largest entries of each update; `ties` (arXiv:2306.01708) also
        drops entries whose sign differs from the majority's, and takes the mean; `dare_linear` and `dare_ties` (arXiv:2311.03099) keep
        random entries, scaled up. These are PEFT's `cat`, `svd` and `..._svd`. Weights of the base that adapters train (heads, biases)
        are combined by the same method without approximation.

        Args:
            name: the name of the new adapter.
            weights: name -> weight, of any sign.
            method: one of `combine.METHODS`.
            rank: the rank of the result, for all methods but `linear` and `cat`. Default: in each layer the largest of those combined.
            density: the fraction of entries that pruning keeps.
            majority: for the ties methods: `total` (default) compares sums of entries, `frequency` counts their signs.
            seed: for the dare methods; 0 by default.

        Raises:
            InputError: the name is taken, a name, method or option is unknown, an option is missing, the method does not take it, or
                an adapter's method is not low-rank.
        """
        self._check_new(name)
        how = Combination(method, {self._known(n).name: w for n, w in weights.items()}, rank, density, majority, seed)
        adapters = [self._adapters[n] for n in weights]
        for adapter in adapters:
            if not adapter.low_rank:
                raise InputError(f"combine: the change that '{adapter.method_name}' makes ('{adapter.name}') is not low-rank.")
        combined = {}
        for site in self._sites:
            here = {a.name: f for a in adapters if (f := a.factors.get(site.name)) is not None}
            if here:
                combined[site.name] = how.factors(here, site.name, site.depth or 1)
        layouts = layouts_of(self._sites, [combined])
        model = inject_layout(self.base, Layout(layouts, False, _holder(adapters), "none", ()))
        modules = site_modules(model)
        for layout in layouts:
            fitted, module = combined[layout.site.name].fitted(layout), modules[layout.site.name]
            module.fill(module.method.of_low_rank(fitted.a, fitted.b, fitted.scale) or {})
            module.ranks = nnx.static(tuple(int(r) for r in fitted.ranks))
        for weight, variable in named_variables(model):
            if changed := [a for a in adapters if weight in a.changed]:
                base = _host(self._arrays[weight])
                change = how.changes({a.name: _host(a.part.trainable[weight]) - base for a in changed}, weight)
                variable.set_value(jnp.asarray(base + change))
                variable.set_metadata(LABEL, changed[0].part.labels[weight])
        self._keep(name, model)

    def _keep(self, name: str, adapted: nnx.Module) -> None:
        try:
            part = partition(adapted)
        except ValueError as error:
            raise InputError(f"adapter '{name}': {error}") from None
        own = {n: a.shape for n, a in (part.frozen | part.trainable).items() if n not in part.parameters}
        wanted = {n: a.shape for n, a in self._arrays.items()}
        unlike = sorted(n for n in own.keys() | wanted.keys() if own.get(n) != wanted.get(n))
        if unlike:
            raise InputError(f"adapter '{name}': its model has another base than the bank; they differ in {', '.join(unlike[:4])}.")
        part = dataclasses.replace(part, frozen={n: self._arrays[n] for n in part.frozen})
        trained = {n: a for n, a in part.trainable.items() if n not in part.parameters}
        changed = frozenset(n for n, a in trained.items() if not np.array_equal(_host(a), _host(self._arrays[n])))
        methods = {module.method: module.method.low_rank(module) is not None for module in site_modules(adapted).values()}
        self._adapters[name] = _Adapter(name, part, changed, next(iter(methods), None), all(methods.values()))
        self._mixed = None

    def _mixable(self) -> list[_Adapter]:
        return [a for a in self._adapters.values() if a.low_rank and not a.changed]

    def _known(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise InputError(f"no adapter '{name}' in the bank. {hint(name, self._adapters)}")
        return self._adapters[name]

    def _check_new(self, name: str) -> None:
        if name in self._adapters:
            raise InputError(f"adapter '{name}' is in the bank already.")


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter of a bank.

    Attributes:
        name: in the bank.
        part: its model in parts, `part.frozen` being the base's own arrays.
        changed: weights of the base that are others in it.
        method: whose arrays it has at sites; None where it has none.
        low_rank: whether all it changes at sites is low-rank.
    """

    name: str
    part: Partition
    changed: frozenset[str]
    method: Method | None
    low_rank: bool

    @property
    def method_name(self) -> str:
        """The method's, for messages."""
        return "none" if self.method is None else self.method.name

    @property
    def factors(self) -> dict[str, Factors]:
        """Site name -> factors, on the host."""
        return factors_of(self.model())

    def model(self) -> nnx.Module:
        """The base with the adapter, for inference."""
        return self.part.merge(self.part.trainable, self.part.settings, self.part.frozen, training=False)


def _holder(adapters: Sequence[_Adapter]) -> Method:
    """A method that can hold every low-rank change: the adapters' own, or another one."""
    one = np.zeros((1, 1, 1), np.float32)
    methods = [a.method for a in adapters if a.method is not None] + list(METHODS.all().values())
    return next(m for m in methods if m.of_low_rank(one, one, one[0, 0]) is not None)


def _mixed_model(base: nnx.Module, sites: list[Site], adapters: list[dict[str, Factors]]) -> nnx.Module:
    """The base with the factors of all adapters at each site that any of them adapts."""

    def make(layout: SiteLayout, module: nnx.Module) -> nnx.Module:
        site = layout.site
        lead = (1,) if site.experts is None else (1, site.experts)
        a, b = np.zeros((*lead, site.inputs, 0), np.float32), np.zeros((*lead, 0, site.outputs), np.float32)
        none = Factors(a, b, np.zeros(1, np.float32))
        each = [adapter.get(site.name, none).fitted(layout) for adapter in adapters]
        a, b, scale = (np.stack(column, 1) for column in zip(*((f.a, f.b, f.scale) for f in each), strict=True))
        arrays = [jnp.asarray(x if site.depth is not None else x[0]) for x in (a, b, scale)]
        return MIXED_MODULES[site.kind](module, site, *arrays)

    return replace_sites(base, layouts_of(sites, adapters), make)


def _host(array: jax.Array) -> np.ndarray:
    return to_host(array).astype(np.float32)
