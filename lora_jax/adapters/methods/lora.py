"""LoRA (arXiv:2106.09685, eq. 3): `h = W x + s B A x`, A (r x in), B (out x r), scale s = alpha / r.

Here x is a row, so A is stored (in, r) and B (r, out).
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.doors import INITS
from ...errors import InputError
from ...models.experts import grouped_matmul
from ...models.layers import Rows
from ..inits.base import LowRankConfig, check_init, init_of, of_peft, start_of
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, Plain, register_method
from .peft_form import PeftForm, Reader, Weight, as_kernel, kernel_shape, of_kernel


class LoraSection(LowRankConfig):
    method: Literal["lora"] = Field(default="lora", description="Low-rank updates W + s A B (arXiv:2106.09685).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


class LoraForm(PeftForm):
    """`lora_A` (rank, inputs) and `lora_B` (outputs, rank); of an embedding both without `.weight`, of a convolution with a kernel's axes:
    (rank, channels, height, width) and (outputs, rank, 1, 1).

    Of experts A is (experts * rank, inputs) with an expert's ranks together, and B (outputs, rank * experts) with a rank's experts
    together.
    """

    peft_type, prefix, convolutions = "LORA", "lora_", True
    defaults: Mapping[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "init_lora_weights": True,
        "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "qalora_group_size": 16, "r": 8,
        "rank_pattern": {}, "target_modules": None, "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
        "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    words: Mapping[str, str] = {
        "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }  # fmt: skip
    notes = frozenset({
        "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out", "eva_config", "loftq_config", "corda_config",
        "lora_ga_config",
    })  # fmt: skip
    unsupported: Mapping[str, str] = {
        "use_dora": "DoRA is not supported",
        "use_qalora": "QA-LoRA is not supported",
        "use_bdlora": "block-diagonal LoRA is not supported",
        "lora_bias": "a bias beside B is not supported",
        "velora_config": "VeLoRA is not supported",
        "kasa_config": "KaSA is not supported",
        "arrow_config": "Arrow routing is not supported",
        "monteclora_config": "MonteCLoRA is not supported",
        "alora_invocation_tokens": "activated LoRA is not supported",
        "layer_replication": "layer replication is not supported",
        "megatron_config": "Megatron's layers are not supported",
        "trainable_token_indices": "trainable tokens are not supported; save the embedding with modules_to_save",
        "ensure_weight_tying": "tied adapters are not supported",
    }

    own = frozenset({"init_lora_weights"})

    def check(self, read: Reader) -> None:
        init = read.raw.get("init_lora_weights", True)
        if not isinstance(init, bool | str | None):
            raise read.wrong("init_lora_weights", "true, false or a name")
        if (found := of_peft(init)) is not None and INITS.get(found["kind"], "adapter.init").splits:
            raise InputError(
                f"{read.where}: 'init_lora_weights' is '{init}', which changes the base's own weights. Save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion first: it is then an ordinary LoRA."
            )
        read.flag("fan_in_fan_out")

    def values(self, read: Reader) -> dict[str, Any]:
        return super().values(read) | {"init": of_peft(read.raw.get("init_lora_weights", True)) or "default"}

    def fields(self, section: Any) -> dict[str, Any]:
        said = init_of(section).to_peft(section.init) if isinstance(section, LowRankConfig) else True
        return super().fields(section) | {"init_lora_weights": True if said is None else said}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        total, ones = rank * (site.experts or 1), (1,) * len(site.window)
        return dict(zip(self._names(site), (kernel_shape(site, total), (site.outputs, total, *ones)), strict=True))

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        a, b = arrays["lora_a"], arrays["lora_b"]
        if site.experts is None:
            ones = (1,) * len(site.window)
            return dict(zip(self._names(site), (as_kernel(site, a.T), b.T.reshape(*b.T.shape, *ones)), strict=True))
        both = a.swapaxes(1, 2).reshape(-1, site.inputs), b.transpose(2, 1, 0).reshape(site.outputs, -1)
        return dict(zip(self._names(site), both, strict=True))

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        a, b = (tensors[name] for name in self._names(site))
        if site.experts is None:
            return {"lora_a": of_kernel(site, a).T, "lora_b": b.reshape(b.shape[:2]).T}
        a = a.reshape(site.experts, rank, site.inputs).swapaxes(1, 2)
        return {"lora_a": a, "lora_b": b.reshape(site.outputs, rank, site.experts).transpose(2, 1, 0)}

    def _names(self, site: Site) -> tuple[str, str]:
        return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """Low-rank updates, `W + scale * A B`, or `W + scale * (A B - A0 B0)` where the init takes its start out of the weight.

    How A and B start is the init's (`adapters/inits/`). A subclass whose section is a `LowRankConfig` has them all; one with an `apply` of
    its own has those alone that leave the weight as it is, unless it sets `split_inits`.

    Attributes:
        start: whether the member keeps its start, A0 and B0.
        frozen: the name of the factor that does not train; empty where both do.
    """

    start: bool = False
    frozen: str = ""

    name, section = "lora", LoraSection
    kinds = ("linear", "embedding", "convolution", "expert")
    # None on experts, as in PEFT; an embedding's input is an index, and nothing of it is dropped.
    dropout_kinds = ("linear", "embedding", "convolution")
    setting_names = ("scale",)
    packs = "low-rank"
    self_padding = True
    peft = LoraForm()
    split_inits: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "apply" in vars(cls) and "split_inits" not in vars(cls):
            cls.split_inits = False
        if "apply" in vars(cls) and "peft" not in vars(cls):  # what it computes, LoRA's files would not say
            cls.peft = None

    def variant(self, config: Any) -> Method:
        init = init_of(config)
        return dataclasses.replace(self, start=init.splits, frozen=init.frozen)

    def check(self, config: Any, site: Site, rank: int) -> None:
        check_init(config, site, rank)
        if init_of(config).splits and not self.split_inits:
            kind = config.init.kind
            raise InputError(f"adapter.init: '{kind}' takes its start out of the weight, and '{self.name}' has no form without it.")

    def wants(self, config: Any) -> frozenset[str]:
        return init_of(config).wants

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        lead, experts = ((), ()) if site.experts is None else ((site.experts,), ("experts",))
        a = Parameter((*lead, site.inputs, rank), "adapter_a", (*experts, "in", None), trained=self.frozen != "lora_a")
        b = Parameter((*lead, rank, site.outputs), "adapter_b", (*experts, None, "out"), trained=self.frozen != "lora_b")
        factors = {"lora_a": a, "lora_b": b}
        return factors | ({f"{name}0": dataclasses.replace(p, trained=False) for name, p in factors.items()} if self.start else {})

    def settings(self, config: Any, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / np.sqrt(rank) if config.rslora else alpha / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        return start_of(config, site, rank, random, data)

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, scale = (v[...].astype(y.dtype) for v in (module.lora_a, module.lora_b, module.scale))
        if module.kind == "embedding":
            return y + widened(a[inputs[0]] * scale, b)
        if module.kind == "expert":
            x, expert = inputs
            change = grouped_matmul(grouped_matmul(x.astype(y.dtype), a, expert) * scale, b, expert)
        else:
            low = module.project(module.drop(inputs[0], rows).astype(y.dtype), a)
            change = widened(low * scale, b)
        if not self.start:
            return y + change
        # With equal factors the two products are the same to the bit. Nothing of the start drops: it is part of the weight.
        a0, b0 = (v[...].astype(y.dtype) for v in (module.lora_a0, module.lora_b0))
        if module.kind == "expert":
            return y + (change - grouped_matmul(grouped_matmul(inputs[0].astype(y.dtype), a0, inputs[1]) * scale, b0, inputs[1]))
        return y + (change - jnp.matmul(module.project(inputs[0].astype(y.dtype), a0) * scale, b0))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = Lora.low_rank(self, module)  # a subclass's change may not be low-rank
        scale = scale.reshape(*scale.shape, *[1] * (a.ndim - scale.ndim))
        return weight + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        a, b, scale = module.lora_a[...], module.lora_b[...], module.scale[...]
        if self.start:  # rank by rank in turn, so that padding stays behind what is used
            a = jnp.stack([a, module.lora_a0[...]], -1).reshape(*a.shape[:-1], -1)
            b = jnp.stack([b, -module.lora_b0[...]], -2).reshape(*b.shape[:-2], -1, b.shape[-1])
        return a, b, scale

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray] | None:
        return None if self.start else {"lora_a": a, "lora_b": b, "scale": scale}

    def plain(self, module: AdaptedSite, config: Any, weight: jax.Array | None) -> Plain | None:
        if not self.start:
            return None
        method, names = dataclasses.replace(self, start=False), ("lora_a", "lora_b", "scale")
        if weight is None:  # as PEFT converts such adapters: of twice the rank
            return Plain(method, _doubled(config), dict(zip(names, self.low_rank(module), strict=True)), 2)
        start: Any = types.SimpleNamespace(lora_a=module.lora_a0, lora_b=-module.lora_b0[...], scale=module.scale)
        kept = {name: getattr(module, name)[...] for name in names}
        return Plain(method, _with(config, {"init": "default"}), kept, 1, method.merged(start, weight, None)[0])

    def cost(self, site: Site, rank: int) -> int:
        return 2 * sum(math.prod(p.shape) for p in self.parameters(site, rank).values()) // (site.experts or 1)


def _with(config: Any, values: dict[str, Any]) -> Any:
    """A section with other values, read anew."""
    return type(config)(**(config.model_dump() | values))


def _doubled(config: Any) -> Any:
    """The section of an adapter of twice the rank, and the same scale."""
    more = 2**0.5 if getattr(config, "rslora", False) else 2
    values: dict[str, Any] = {"rank": 2 * config.rank, "alpha": more * config.alpha, "init": "default"}
    values["rank_pattern"] = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    values["alpha_pattern"] = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    return _with(config, values)


@jax.custom_vjp
def widened(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low @ b`, (..., r) by (r, outputs), with B's gradient as `low^T dy`.

    JAX's own is `(dy^T low)^T`. On a CPU that transposes the large dy, and fuses what dy is computed from (an activation's derivative)
    into that copy, element by element: it cost a third of the step where an MLP is adapted. It has no forward-mode derivative.
    """
    return jnp.matmul(low, b)


def _widened_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(low, b), (low, b)


def _widened_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    rows = tuple(range(low.ndim - 1))
    return jnp.matmul(dy, b.T), jnp.tensordot(low, dy, (rows, rows))


widened.defvjp(_widened_forward, _widened_backward)

register_method("lora", Lora())
