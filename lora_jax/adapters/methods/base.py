"""What a method is. Each has one file beside this one, or in a package of its own (`register_method`, an entry point `lora_jax.methods`).

A method says which arrays it has at a site (`parameters`), how they start (`init`, `settings`), what the site then computes (`apply`) and
the weight that computes the same (`merged`). All the rest follows from these: padding, labels, sharding, counts, packs, files. Labels
come from one ordered `regex -> label` table, which says of every parameter whether it trains, and in which optimizer group.

Padding follows from the shapes: a member of rank r uses the leading part, of the shape that `parameters` says at rank r, of an array that
holds several members.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...config.doors import METHODS
from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import AXES, PER_SEGMENT, Rows, uniform
from ...models.stored import weight_axes
from ..contraction import GENERAL, flat_kernel, flat_site
from ..inits.base import INIT_BATCHES
from ..labels import HEAD, Table, base_labels, label_of
from ..parameters import AdapterSetting, DropoutKey, Parameter, SiteArrays, SiteData, largest, variable_of
from ..sites import Site, SiteModule, named_variables
from .peft_form import PeftForm


class Method:
    """A way to adapt a base; the defaults are those of a method without anything to train.

    What a member's arrays are may depend on options of its section. Such a method is a frozen dataclass, registered with the defaults,
    and `variant` gives it with the options of a section: members of one pack have equal variants.

    Attributes:
        name: as `adapter.method` says it.
        section: its config section, with a field `method` of type `Literal[name]`.
        kinds: the kinds of site it adapts (`Site.kind`); none: it has no arrays at sites.
        dropout_kinds: those of them where `adapter.dropout` is allowed.
        setting_names: numbers of each layer, (layers,) float32, 0 where a layer is not adapted; `settings` gives them.
        ignores: keys of every adapter section that it has no use for: a section that sets one is told so.
        packs: what a further member of a pack adds: `low-rank` work of the size of the rank, `activation` work on the input or output
            alone, `weight-sized` an array of the weight's size.
        self_padding: whether padding keeps its fill value by itself, as LoRA's zeros do: their gradients are 0, and AdamW leaves what
            is 0 at 0. Otherwise the update of the padding is masked.
    """

    name: str
    section: type[AdapterConfig]
    kinds: tuple[str, ...] = ()
    dropout_kinds: tuple[str, ...] = ()
    setting_names: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    packs: Literal["low-rank", "activation", "weight-sized"] = "activation"
    self_padding: bool = False
    peft: PeftForm | None = None

    def __repr__(self) -> str:
        return f"<method {self.name}>"

    def configured(self, config: AdapterConfig) -> Any:
        """The config as this method's section, with its keys' defaults where it was given without them."""
        return config if isinstance(config, self.section) else self.section.model_validate(config.model_dump())

    def variant(self, config: Any) -> Method:
        """The method with what a section of it says of the arrays; itself where no option does."""
        return self

    def wants(self, config: Any) -> frozenset[str]:
        """Which `Statistics` the init reads: `moment`, `gradient`."""
        return frozenset()

    def check(self, config: Any, site: Site, rank: int) -> None:
        """Refuses a layer of this rank that the method cannot adapt.

        Raises:
            InputError: names the key, and what would do.
        """

    def check_start(self, config: Any, site: Site, rank: int) -> None:
        """Refuses a layer of this rank that could not start as the base; what was trained elsewhere is read all the same.

        Raises:
            InputError: names the key, and what would do.
        """

    def check_steps(self, config: Any, steps: int) -> None:
        """`InputError`, naming the key, where the method cannot do in so many optimizer steps what a section asks of it."""

    def init_batches(self, config: Any) -> int:
        """Over how many training batches those are gathered."""
        return getattr(config, "init_batches", INIT_BATCHES)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        """Name -> array, of one layer at this rank. The names and the number of axes are the same at every rank."""
        raise TypeError(f"{self!r} adapts sites, but says no parameters")

    def extent(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ranks whose shapes together hold the shapes of all of these: the largest, where shapes grow with the rank."""
        return (max(ranks),)

    def padded(self, site: Site, extent: Sequence[int]) -> dict[str, Parameter]:
        """Name -> array that holds those of all ranks of an extent."""
        each = [self.parameters(site, rank) for rank in extent]
        return {name: largest([one[name] for one in each]) for name in each[0]}

    def settings(self, config: Any, rank: int, alpha: float) -> dict[str, float]:
        """The numbers of one adapted layer, by `setting_names`.

        Args:
            config: the member's section.
            rank, alpha: of the layer; the config's, or what its patterns say.
        """
        return {}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        """How the arrays of one adapted layer start; those left out start at their fill value.

        Args:
            site: the site.
            rank: of the layer.
            config: the member's section.
            random: draws for this member's seed, the site and the layer.
            data: the layer's weight, and what it saw of the data.

        Returns:
            name -> float32 array of the shape in `parameters(site, rank)`.
        """
        return {}

    def init_shared(self, sites: Mapping[Site, int], config: Any, random: np.random.Generator) -> dict[str, np.ndarray]:
        """How the arrays of scope `adapter` start; those left out start at their fill value.

        Args:
            sites: of the member, with the largest rank at each.
            config: the member's section.
            random: draws for this member's seed.

        Returns:
            name -> float32 array, of the largest shape that these sites say.
        """
        return {}

    def penalty(self, sites: Mapping[str, SiteArrays]) -> jax.Array | None:
        """What is added to the loss of an optimizer step, a float32 scalar; None where nothing is.

        Args:
            sites: site name -> the member's arrays.
        """
        return None

    def preconditioned(self, gradients: dict[str, jax.Array], sites: Mapping[str, SiteArrays]) -> dict[str, jax.Array]:
        """The gradients that the optimizer gets, clipped ones: name of the trained array (`site.parameter`) -> gradient."""
        return gradients

    def init_state(self, sites: Mapping[str, SiteArrays]) -> dict[str, Any]:
        """What the method keeps of a member from step to step beside trained arrays: a dict of dicts, name of a trained array -> array."""
        return {}

    def after_step(
        self,
        state: dict[str, Any],
        trainable: dict[str, jax.Array],
        gradients: dict[str, jax.Array],
        sites: Mapping[str, SiteArrays],
        step: jax.Array,
        steps: jax.Array,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The method's state and the trained arrays after an optimizer step, which has updated them already.

        Args:
            state: as `init_state` gives it.
            trainable: name (`site.parameter`) -> array, updated.
            gradients: of the step, by the same names, as computed.
            sites: the member's arrays before the update, with their settings.
            step: int32 scalar, 0-based.
            steps: float32 scalar, how many the member takes in all.
        """
        return state, trainable

    def plain(self, module: AdaptedSite, config: Any, weight: jax.Array | None) -> Plain | None:
        """A site of this method in a form that other programs know; None where it is one already.

        Args:
            module: with the arrays of all its layers.
            config: the member's section.
            weight: of those layers, (..., inputs, outputs) float32, where the base may change for it.
        """
        return None

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        """What an adapted site computes.

        Args:
            module: its arrays of one layer are attributes, by name; `module.base` is the base's module.
            inputs: of the base's module: x (..., inputs) of a linear site, tokens (...) int32 of an embedding, x (batch, height, width,
                channels) of a convolution, where `module.project` is what a product with x is, x (rows, inputs) and expert (rows,) int32
                of an expert site.
            rows: where the rows of a gathered input are, for `module.drop`.

        Returns:
            what the base's module would return, in its dtype.
        """
        raise TypeError(f"{self!r} adapts sites, but does not say how")

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The weight and bias with which the base's module computes what the adapted site does.

        Args:
            module: with the arrays of all its layers.
            weight: of those layers, (..., inputs, outputs) float32.
            bias: (..., outputs) float32; None where there is none.
        """
        raise TypeError(f"{self!r} adapts sites, but does not say how to merge them")

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """A (..., inputs, rank), B (..., rank, outputs) and scale (...) where the change of the weight is `scale * A B`, else None.

        Banks mix and combine adapters by these.
        """
        return None

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray] | None:
        """The arrays and settings with which `low_rank` gives these back; None where the method cannot say every low-rank change."""
        return None

    def count(self, site: Site, rank: int) -> int:
        """How many numbers one adapted layer trains."""
        return sum(math.prod(p.shape) for p in self.parameters(site, rank).values() if p.trained)

    def cost(self, site: Site, rank: int) -> int:
        """FLOPs that one adapted layer adds to a forward pass, a token."""
        return 2 * self.count(site, rank) // (site.experts or 1)

    @property
    def has_state(self) -> bool:
        """Whether `after_step` does anything: a step without it has nothing of it."""
        return type(self).after_step is not Method.after_step

    def labels(self, sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
        """Ordered `regex -> label` rules for the base's parameters; arguments as for `base_labels`."""
        return base_labels(sites, bias, modules_to_save)

    def prepare(self, model: nnx.Module) -> None:
        """Changes how an adapted model's layers are run, in place; the model's modules are a copy, its arrays the caller's."""

    def refuse_without(self, model: nnx.Module, pattern: str, what: str) -> None:
        """`InputError` where a model has no parameter whose name matches a regular expression, for `prepare` of a method without sites."""
        if not any(re.fullmatch(pattern, name) and label_of(name, HEAD + ((".*", ""),)) == "" for name, _ in named_variables(model)):
            raise InputError(f"adapter.method: '{self.name}' trains the {what} of the base, and this one has none.")


@dataclasses.dataclass(frozen=True)
class Plain:
    """A site in another form.

    Attributes:
        method, config: of the other form; the section is that of the whole adapter.
        arrays: name -> all that it has there, settings too.
        times: how many times as large the ranks are.
        weight: the base's weight, as it was given, where it changes; else None.
    """

    method: Method
    config: Any
    arrays: dict[str, jax.Array]
    times: int = 1
    weight: jax.Array | None = None


class AdaptedSite(SiteModule):
    """An adapted site: the base's module with a method's arrays.

    Args:
        base: the module that stood at the site.
        site: the site.
        layers: of how many layers it holds arrays, in front of each; None where the weight is not stacked.
        extent: the ranks that the arrays hold (`Method.extent`).
        method: whose arrays they are.
        dropout: whether any member drops inputs; without it the program has no random number.
        shared: name -> variable, of the arrays of scope `adapter`.

    Attributes:
        rank: the largest that the arrays hold.
        ranks: of each layer, without padding; 0 where it is not adapted. Static: for descriptions alone.
    """

    def __init__(
        self,
        base: nnx.Module,
        site: Site,
        *,
        layers: int | None,
        extent: tuple[int, ...],
        method: Method,
        dropout: bool,
        shared: Mapping[str, nnx.Variable] | None = None,
    ):
        super().__init__(base, site)
        lead = () if layers is None else (layers,)
        stacked: dict[str, Any] = {PER_SEGMENT: True} if layers is not None else {}
        self.method: Method = nnx.static(method)
        self.site: Site = nnx.static(site)
        self.extent: tuple[int, ...] = nnx.static(extent)
        self.rank = max(extent)
        self.ranks: tuple[int, ...] = nnx.static((self.rank,) * (layers or 1))
        self.deterministic = False
        axes = None if isinstance(base, GENERAL) else weight_axes(base, site.weight)
        for name, parameter in method.padded(site, extent).items():
            if parameter.scope == "adapter":
                setattr(self, name, (shared or {})[name])
                continue
            variable = variable_of(name, parameter, lead, stacked)
            if axes:
                # Along the weight's axes; what is along none of them has no name, and is replicated.
                along: dict[str | None, str | None] = dict(zip(("out", "in", "experts"), reversed(axes[len(lead) :]), strict=False))
                own = (along.get(axis) for axis in parameter.axes or (None,) * len(parameter.shape))
                variable.set_metadata(AXES, (*axes[: len(lead)], *own))
            setattr(self, name, variable)
        for name in method.setting_names:
            setattr(self, name, AdapterSetting(jnp.zeros(lead), **stacked))
        if dropout and site.kind in method.dropout_kinds:
            self.dropout_rate = AdapterSetting(jnp.zeros(lead), **stacked)
            self.dropout_key = DropoutKey(jnp.broadcast_to(jax.random.key(0), lead), **stacked)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __call__(self, *inputs: jax.Array, rows: Rows | None = None, out_sharding: Any = None, einsum_str: None = None) -> jax.Array:
        if out_sharding is not None:  # Flax's own attention hands it on, None as a rule
            raise InputError(f"{self.site.name}: an adapted site takes no out_sharding: constrain its output instead.")
        if einsum_str is not None or (isinstance(self.base, GENERAL) and any(more is not None for more in inputs[1:])):
            raise InputError(f"{self.site.name}: an adapted site computes the einsum it was made with, and takes its input alone.")
        if not isinstance(self.base, GENERAL):
            return self.method.apply(self, *inputs, rows=rows)
        flat: Any = flat_site(self, inputs[0])
        return flat.unfold(self.method.apply(flat, flat.x, rows=rows))

    @property
    def stacked(self) -> bool:
        """Whether its arrays have layers in front."""
        return self.site.depth is not None

    def base_arrays(self) -> tuple[jax.Array, jax.Array | None]:
        """The base's weight and bias of the layers that it has arrays for, float32: (..., inputs, outputs) and (..., outputs)."""
        layers = len(self.ranks) if self.stacked else None
        own = [getattr(self.base, name, None) for name in (self.weight, "bias")]
        weight, bias = (None if v is None else (v[...] if layers is None else v[...][-layers:]).astype(jnp.float32) for v in own)
        assert weight is not None
        if isinstance(self.base, GENERAL):  # of which methods know one axis of inputs and one of outputs
            weight = flat_kernel(self.base, weight)
            bias = None if bias is None else bias.reshape(*weight.shape[:-2], self.site.outputs)
        return weight, bias

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view(model, deterministic=True)` calls: no dropout from here on."""
        if deterministic is not None:
            self.deterministic = deterministic

    def project(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """x times a matrix (inputs, n): what the base's layer computes with it in the place of its weight, without its bias."""
        return jnp.matmul(x, matrix)

    def drop(self, x: jax.Array, rows: Rows | None) -> jax.Array:
        """x with a fraction of its entries set to 0 and the others scaled up, while training; x itself otherwise."""
        if self.deterministic or not hasattr(self, "dropout_rate"):
            return x
        rate = self.dropout_rate[...]
        kept = uniform(self.dropout_key[...], x, rows) >= rate
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets arrays and settings by name, in place; layers in front of each, one where the weight is not stacked."""
        for name, value in arrays.items():
            getattr(self, name).set_value(jnp.asarray(value if self.stacked else value[0]))


def method_of(config: AdapterConfig) -> Method:
    """The method that a config names, in the variant that it asks for.

    Raises:
        InputError: there is none of this name.
    """
    method: Method = METHODS.get(config.method, "adapter.method")
    return method.variant(method.configured(config))


register_method = METHODS.register
