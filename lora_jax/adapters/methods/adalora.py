"""AdaLoRA (ICLR 2023, openreview lq62uWRJjiY): `h = W x + s B diag(E) A x`, whose ranks fall where they matter least.

s = alpha / init_r, whatever is left of a layer's rank. The loss gets `orth_reg_weight` times the mean of `||A A^T - I||` and
`||B^T B - I||` over all A and B (eq. 4; norms and not their squares, as in PEFT). Every number w of a triplet (a row of A, an entry of E,
a column of B) has a sensitivity `|w dL/dw|`, smoothed to I, and an uncertainty `|sensitivity - I|`, smoothed to U (eq. 8 to 10); a
triplet's score is the sum of I U of its E and of the means over its row and its column (eq. 7). A budget of triplets falls from init_r to
target_r a layer, by a cubic (eq. 12), and at every `deltaT`-th step E is set to 0 in all triplets but the best of the whole adapter, which
are as many. They may come back until the budget stands, `tfinal` steps before the end.

Here x is a row, so A is stored (in, r) and B (r, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from ...config.schema import AdapterConfig
from ...config.types import Fraction, NonNegativeFloat, Rank
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter, SiteArrays, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .lora import LoraForm, widened
from .peft_form import PeftForm, Reader, Weight

_ARRAYS = ("lora_a", "lora_e", "lora_b")
# Keys that are a member's own numbers as they are.
_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class AdaLoraSection(AdapterConfig):
    method: Literal["adalora"] = Field(default="adalora", description="Low-rank updates whose ranks are allotted (lq62uWRJjiY).")
    rank: Rank = Field(default=12, description="Rank of each update at the start (PEFT's init_r).")
    target_r: Rank = Field(default=8, description="Mean rank at the end; at most rank.")
    tinit: NonNegativeInt = Field(default=0, description="Steps before the first allotment.")
    tfinal: NonNegativeInt = Field(default=0, description="Steps at the end, in which ranks stay as they are.")
    deltaT: PositiveInt = Field(default=1, description="Steps from one allotment to the next.")
    beta1: Fraction = Field(default=0.85, description="Smoothing of the sensitivity.")
    beta2: Fraction = Field(default=0.85, description="Smoothing of its uncertainty.")
    orth_reg_weight: NonNegativeFloat = Field(default=0.5, description="Weight of the penalty that keeps A and B orthogonal.")


_IGNORED = "PEFT does nothing with it in this type"


class AdaLoraForm(PeftForm):
    """`lora_A` (rank, inputs), `lora_E` (rank, 1) and `lora_B` (outputs, rank).

    `rank_pattern` says of each module which of its first `init_r` triplets the budget left; the tensors hold these alone.
    """

    peft_type, prefix = "ADALORA", "lora_"
    defaults: Mapping[str, Any] = dict(LoraForm.defaults) | {
        "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "orth_reg_weight": 0.5, "rank_pattern": None, "target_r": 8, "tfinal": 0,
        "tinit": 0, "total_step": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"} | {name: name for name in _SCHEDULE}
    own = frozenset({"rank_pattern", "total_step"})
    notes = frozenset({"r", "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out", "init_lora_weights"})
    unsupported: Mapping[str, str] = dict(LoraForm.unsupported) | {
        key: _IGNORED for key in ("alpha_pattern", "use_rslora", "corda_config", "eva_config", "loftq_config", "lora_ga_config")
    }
    optional = ("lora_A", "lora_B", "lora_E")  # where nothing is left

    def fields(self, section: Any) -> dict[str, Any]:
        # PEFT takes no config without them, and none in which they leave no step between `tinit` and `tfinal`.
        return super().fields(section) | {"total_step": section.tinit + section.tfinal + 1, "rank_pattern": None}

    def rank_of(self, section: Any, module: str, rank: int, read: Reader) -> int:
        kept = next((kept for name, kept in (read.raw.get("rank_pattern") or {}).items() if name.startswith(f"{module}.lora_E")), None)
        return rank if kept is None else sum(kept)

    def check(self, read: Reader) -> None:
        pattern = read.raw.get("rank_pattern")
        if pattern is not None and not (
            isinstance(pattern, dict) and all(isinstance(v, list) and all(isinstance(k, bool) for k in v) for v in pattern.values())
        ):
            raise read.wrong("rank_pattern", "an object of lists of true and false")

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, site.inputs), "lora_E": (rank, 1), "lora_B": (site.outputs, rank)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"lora_A": arrays["lora_a"].T, "lora_E": arrays["lora_e"][:, None], "lora_B": arrays["lora_b"].T}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        if missing := sorted(self.tensors(section, site, rank).keys() - tensors.keys()):
            raise InputError(
                f"the file lacks {', '.join(missing)} of a layer of {site.name}, and its rank_pattern leaves {rank} ranks there."
            )
        return {"lora_a": tensors["lora_A"].T, "lora_e": tensors["lora_E"][:, 0], "lora_b": tensors["lora_B"].T}


class AdaLora(Method):
    name, section = "adalora", AdaLoraSection
    kinds = dropout_kinds = ("linear", "convolution")
    setting_names = ("scale", "triplets", *_SCHEDULE)
    peft = AdaLoraForm()
    packs = "low-rank"
    self_padding = True  # of A, E and B together, as LoRA's; the penalty of what is 0 is 0

    def check(self, config: AdaLoraSection, site: Site, rank: int) -> None:
        if config.target_r > rank:
            raise InputError(f"adapter.target_r: {config.target_r} is more than the rank that {site.name} starts with, {rank}.")

    def check_steps(self, config: AdaLoraSection, steps: int) -> None:
        if config.tinit >= steps - config.tfinal:
            raise InputError(
                f"adapter.tinit, adapter.tfinal: {config.tinit} and {config.tfinal} leave no step of {steps} for ranks to fall."
            )

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {
            "lora_a": Parameter((site.inputs, rank), "adapter_a", ("in", None)),
            "lora_e": Parameter((rank,), "adapter_a", (None,)),
            "lora_b": Parameter((rank, site.outputs), "adapter_b", (None, "out")),
        }

    def settings(self, config: AdaLoraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / config.rank, "triplets": rank} | {name: getattr(config, name) for name in _SCHEDULE}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        drawn = np.float32(0.02) * random.standard_normal((rank, site.inputs + site.outputs), np.float32)
        return {"lora_a": drawn[:, : site.inputs].T, "lora_b": drawn[:, site.inputs :]}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, gain = (v.astype(y.dtype) for v in (module.lora_a[...], module.lora_b[...], module.lora_e[...] * module.scale[...]))
        return y + widened(module.project(module.drop(inputs[0], rows).astype(y.dtype), a) * gain, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = self.low_rank(module)
        return weight + scale[..., None, None] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        return module.lora_a[...] * module.lora_e[...][..., None, :], module.lora_b[...], module.scale[...]

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        return {"lora_a": a, "lora_e": np.ones((*a.shape[:-2], a.shape[-1]), np.float32), "lora_b": b, "scale": scale}

    def penalty(self, sites: Mapping[str, SiteArrays]) -> jax.Array:
        total = jnp.float32(0)
        for of in sites.values():
            for a in (of.lora_a, jnp.swapaxes(of.lora_b, -1, -2)):
                product = jnp.matmul(jnp.swapaxes(a, -1, -2), a, precision=jax.lax.Precision.HIGHEST)
                square = jnp.square(product - jnp.eye(a.shape[-1]) * _own(of)[..., None, :]).sum((-2, -1))
                some = square > 0  # a root has no gradient at 0
                total += jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0).sum()
        return _number(sites, "orth_reg_weight") * total / (2 * _layers(sites))

    def init_state(self, sites: Mapping[str, SiteArrays]) -> dict[str, Any]:
        zeros = {f"{name}.{array}": jnp.zeros_like(getattr(of, array)) for name, of in sites.items() for array in _ARRAYS}
        kept = {f"{name}.lora_e": jnp.ones_like(of.lora_e) for name, of in sites.items()}
        return {"sensitivity": zeros, "uncertainty": dict(zeros), "kept": kept}

    def after_step(
        self,
        state: dict[str, Any],
        trainable: dict[str, jax.Array],
        gradients: dict[str, jax.Array],
        sites: Mapping[str, SiteArrays],
        step: jax.Array,
        steps: jax.Array,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """PEFT's `update_and_allocate(step)`: statistics before the last `tfinal` steps, at their begin the last allotment."""
        at = step.astype(jnp.float32)
        tinit, tfinal, every = (_number(sites, name) for name in ("tinit", "tfinal", "deltaT"))
        last = steps - tfinal
        smooth, unsure = {}, {}
        for name, old in state["sensitivity"].items():
            now = jnp.abs(trainable[name] * gradients[name])
            smooth[name] = _mixed(old, now, _number(sites, "beta1"))
            unsure[name] = _mixed(state["uncertainty"][name], jnp.abs(now - smooth[name]), _number(sites, "beta2"))
        smooth, unsure = (jax.tree.map(lambda a, b: jnp.where(at < last, a, b), new, state[old]) for new, old in
                          ((smooth, "sensitivity"), (unsure, "uncertainty")))  # fmt: skip

        first = sum((_own(of).sum() for of in sites.values()), jnp.float32(0))
        target = _number(sites, "target_r") * _layers(sites)
        left = jnp.clip(1 - (at - tinit) / jnp.maximum(last - tinit, 1), 0, 1)
        budget = jnp.floor((first - target) * left**3 + target + 1e-3)  # float32 may fall just short of a whole number
        allots = (at == last) | ((at < last) & (at > tinit) & (at % every == 0))

        # What is padding is above every threshold.
        scores = {f"{name}.lora_e": jnp.where(_own(of) > 0, _score(name, smooth, unsure), jnp.inf) for name, of in sites.items()}
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        dropped = (first - budget).astype(jnp.int32)
        threshold = jnp.where(dropped > 0, ordered[dropped - 1], -jnp.inf)
        kept = {name: jnp.where(allots, score > threshold, state["kept"][name] > 0).astype(jnp.float32) for name, score in scores.items()}
        masks = allots | (at > last)
        trained = {name: jnp.where(masks & (kept[name] == 0), 0, trainable[name]) for name in kept}
        return {"sensitivity": smooth, "uncertainty": unsure, "kept": kept}, trainable | trained


def _own(of: SiteArrays) -> jax.Array:
    """(..., rank) float32: 1 where a layer has a triplet, 0 in the padding."""
    return (jnp.arange(of.lora_e.shape[-1]) < of.triplets[..., None]).astype(jnp.float32)


def _layers(sites: Mapping[str, SiteArrays]) -> jax.Array:
    return jnp.maximum(sum(((of.triplets > 0).sum() for of in sites.values()), jnp.int32(0)), 1).astype(jnp.float32)


def _number(sites: Mapping[str, SiteArrays], name: str) -> jax.Array:
    """A setting that all adapted layers of a member share, float32; others have 0 in its place."""
    return jnp.stack([getattr(of, name).max() for of in sites.values()]).max()


def _mixed(old: jax.Array, new: jax.Array, beta: jax.Array) -> jax.Array:
    return beta * old + (1 - beta) * new


def _score(site: str, smooth: Mapping[str, jax.Array], unsure: Mapping[str, jax.Array]) -> jax.Array:
    """(..., rank): of each triplet of a site."""
    a, e, b = (smooth[f"{site}.{name}"] * unsure[f"{site}.{name}"] for name in _ARRAYS)
    return e + a.mean(-2) + b.mean(-1)


register_method("adalora", AdaLora())
