"""LoRA (arXiv:2106.09685, eq. 3): `h = W x + s B A x`, A (r x in), B (out x r), scale s = alpha / r.

Here x is a row, so A is stored (in, r) and B (r, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.experts import grouped_matmul
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Reader, Weight


class LoraSection(AdapterConfig):
    method: Literal["lora"] = Field(default="lora", description="Low-rank updates W + s A B (arXiv:2106.09685).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


# Inits that take something out of the base's own weights: the file then belongs to a base that is nowhere stored.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class LoraForm(PeftForm):
    """`lora_A` (rank, inputs) and `lora_B` (outputs, rank); of an embedding both without `.weight`.

    Of experts A is (experts * rank, inputs) with an expert's ranks together, and B (outputs, rank * experts) with a rank's experts
    together.
    """

    peft_type, prefix = "LORA", "lora_"
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
        "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out", "init_lora_weights", "eva_config", "loftq_config",
        "corda_config", "lora_ga_config",
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

    def check(self, read: Reader) -> None:
        init = read.raw.get("init_lora_weights", True)
        if not isinstance(init, bool | str | None):
            raise read.wrong("init_lora_weights", "true, false or a name")
        if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
            raise InputError(
                f"{read.where}: 'init_lora_weights' is '{init}', which changes the base's own weights. Save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion first: it is then an ordinary LoRA."
            )
        read.flag("fan_in_fan_out")

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        total = rank * (site.experts or 1)
        return dict(zip(self._names(site), ((total, site.inputs), (site.outputs, total)), strict=True))

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        a, b = arrays["lora_a"], arrays["lora_b"]
        if site.experts is None:
            return dict(zip(self._names(site), (a.T, b.T), strict=True))
        both = a.swapaxes(1, 2).reshape(-1, site.inputs), b.transpose(2, 1, 0).reshape(site.outputs, -1)
        return dict(zip(self._names(site), both, strict=True))

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        a, b = (tensors[name] for name in self._names(site))
        if site.experts is None:
            return {"lora_a": a.T, "lora_b": b.T}
        a = a.reshape(site.experts, rank, site.inputs).swapaxes(1, 2)
        return {"lora_a": a, "lora_b": b.reshape(site.outputs, rank, site.experts).transpose(2, 1, 0)}

    def _names(self, site: Site) -> tuple[str, str]:
        return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")


class Lora(Method):
    """Low-rank updates, `W + scale * A B`.

    The default init is PEFT's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0 (kaiming_uniform with a = sqrt 5); at an
    embedding A = 0 and B ~ N(0, 1). Each expert draws its own.
    """

    name, section = "lora", LoraSection
    kinds = ("linear", "embedding", "expert")
    dropout_kinds = ("linear", "embedding")  # none on experts, as in PEFT; an embedding's input is an index, and nothing of it is dropped
    setting_names = ("scale",)
    packs = "low-rank"
    self_padding = True
    peft = LoraForm()

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        lead, experts = ((), ()) if site.experts is None else ((site.experts,), ("experts",))
        return {
            "lora_a": Parameter((*lead, site.inputs, rank), "adapter_a", (*experts, "in", None)),
            "lora_b": Parameter((*lead, rank, site.outputs), "adapter_b", (*experts, None, "out")),
        }

    def settings(self, config: LoraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / np.sqrt(rank) if config.rslora else alpha / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        # Rank after rank is drawn, so that a smaller rank starts as the leading part of a larger (`adapter.nested_init`).
        if site.kind == "embedding":
            return {"lora_b": random.standard_normal((rank, site.outputs), np.float32)}
        experts = () if site.experts is None else (site.experts,)
        drawn = 2 * random.random((rank, *experts, site.inputs), np.float32) - 1
        return {"lora_a": np.moveaxis(drawn, 0, -1) * np.float32(1 / np.sqrt(site.inputs))}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, scale = (v[...].astype(y.dtype) for v in (module.lora_a, module.lora_b, module.scale))
        if module.kind == "embedding":
            return y + widened(a[inputs[0]] * scale, b)
        if module.kind == "expert":
            x, expert = inputs
            return y + grouped_matmul(grouped_matmul(x.astype(y.dtype), a, expert) * scale, b, expert)
        low = jnp.matmul(module.drop(inputs[0], rows).astype(y.dtype), a)
        return y + widened(low * scale, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = (v[...] for v in (module.lora_a, module.lora_b, module.scale))
        scale = scale.reshape(*scale.shape, *[1] * (a.ndim - scale.ndim))
        return weight + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        return module.lora_a[...], module.lora_b[...], module.scale[...]

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        return {"lora_a": a, "lora_b": b, "scale": scale}


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
