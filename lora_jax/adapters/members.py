"""One member's numbers in a structure: its factors (initialised by its own seed and padded), scales and dropout rates.

What is drawn depends on the member's seed, the site's name and the layer, and never on what else is in the pack: a member starts
the same alone and in any company. Rank after rank is drawn: of two members with one seed the smaller starts as the leading part of
the larger, so that they differ in their rank alone (`adapter.nested_init`). NumPy draws it, so that a hundred members of different
ranks compile nothing.
"""

from __future__ import annotations

import zlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.schema import AdapterConfig
from .inject import site_modules
from .modules import LoRAEmbed, LowRank
from .sites import logical_name
from .spec import MemberSite, MemberSpec


def fill_member(model: nnx.Module, spec: MemberSpec, seed: int) -> None:
    """Sets the adapters of a model made by `inject_structure` to one member at step 0, in place.

    The default init is PEFT's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0 (kaiming_uniform with a = sqrt 5); at an
    embedding A = 0 and B ~ N(0, 1). Each expert draws its own.
    """
    for name, module in site_modules(model).items():
        _fill_site(module, name, spec.sites.get(name), spec.config, seed)


def draw_head(model: nnx.Module, seed: int) -> None:
    """Draws a task's new head by a member's seed, each of its matrices from N(0, 0.02), in place; a head that was loaded stays."""
    new = getattr(model, "new", ())
    for path, variable in nnx.iter_graph(model):
        module, _, parameter = logical_name(path).rpartition(".")
        if isinstance(variable, nnx.Param) and parameter == "kernel" and module in new:
            drawn = random_of(seed, module, 0).standard_normal(variable.shape, np.float32)
            variable.set_value(jnp.asarray(0.02 * drawn, variable.dtype))


def random_of(seed: int, name: str, layer: int, *more: int) -> np.random.Generator:
    """Random numbers for a seed, name and layer: the same in every process and on every platform."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), layer, *more])))


def _fill_site(module: LowRank, name: str, member: MemberSite | None, config: AdapterConfig, seed: int) -> None:
    stacked = module.scale.ndim == 1
    a, b = (np.zeros(f.shape if stacked else (1, *f.shape), np.float32) for f in (module.lora_a, module.lora_b))
    scale, experts = np.zeros(len(a), np.float32), a.shape[1:-2]
    if member is not None:
        first = len(member.ranks) - len(a)
        for i, (rank, layer_scale) in enumerate(zip(member.ranks[first:], member.scales[first:], strict=True)):
            generator = random_of(seed, name, first + i, *([] if config.nested_init else [rank]))
            scale[i] = layer_scale
            if isinstance(module, LoRAEmbed):
                b[i, :rank] = generator.standard_normal((rank, b.shape[2]), np.float32)
            else:
                bound = np.float32(1 / np.sqrt(a.shape[-2]))
                drawn = 2 * generator.random((rank, *experts, a.shape[-2]), np.float32) - 1
                a[i, ..., :rank] = np.moveaxis(drawn, 0, -1) * bound
    for variable, value in ((module.lora_a, a), (module.lora_b, b), (module.scale, scale)):
        variable.set_value(jnp.asarray(value if stacked else value[0]))
    if hasattr(module, "dropout_rate"):
        rate = np.full(module.dropout_rate.shape, config.dropout if member is not None else 0.0, np.float32)
        module.dropout_rate.set_value(jnp.asarray(rate))
