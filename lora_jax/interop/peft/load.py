"""`load_peft`: a PEFT adapter onto a base.

The config says which tensors the file must hold and of which shapes. Nothing is allocated before every one of them is known to be
there, and no other.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...adapters.inject import LABEL, inject_layout, remember, site_modules
from ...adapters.layout import ResolvedAdapter, ResolvedSite, unite
from ...adapters.merge import copy_of
from ...adapters.methods.base import FROZEN
from ...adapters.sites import logical_name
from ...errors import InputError, hint, nearest
from ...models.decoder import Decoder
from ...weights.checkpoint import Checkpoint
from ...weights.safetensors import SafetensorsCheckpoint, read_digests
from .config import CONFIG_NAME, WEIGHTS_NAME, PeftConfig, adapter_folder, check_digests, read_peft_config
from .lora import Factors, factor_keys, factor_shapes, from_file, module_of_key, section_of
from .names import PROJECTION, ROOT, Module, Parameter, PeftNames

_SHOWN = 6
_READABLE = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class _Site:
    """A module with LoRA on it: what the config says of it, and the keys of its factors."""

    module: Module
    rank: int
    scale: float
    a: str
    b: str


@dataclasses.dataclass
class _Plan:
    """What is to be read.

    Attributes:
        sites: the modules with LoRA.
        values: key -> weight of the base that it stands for: saved modules and trained biases.
        copies: the same, of weights that a file may hold and need not: PEFT adds the embeddings where one is adapted.
        saved: our names of the modules that are saved.
        idle: keys that PEFT writes beside these and that change nothing (`bias: all` copies a saved module's bias).
        spare: further ones, of saved embeddings and projections (`save_embedding_layers`), which are not written again.
    """

    sites: list[_Site]
    values: dict[str, Parameter]
    copies: dict[str, Parameter]
    saved: set[str]
    idle: set[str]
    spare: set[str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of all that must be there."""
        shapes = {key: p.shape for key, p in self.values.items()}
        for site in self.sites:
            shapes[site.a], shapes[site.b] = factor_shapes(site.module, site.rank)
        return shapes


def load_peft(model: nnx.Module, path: str | Path) -> nnx.Module:
    """A copy of `model` with a PEFT adapter. `model` itself is unchanged, and both share the base's arrays.

    Scales are computed from the config, alpha / rank or alpha / sqrt(rank), for each module. As with PEFT's `from_pretrained` the
    result is for inference: dropout is off until `nnx.view(adapted, deterministic=False)`.

    Args:
        model: the base without adapters; with a head if the adapter contains one.
        path: the adapter's folder, or `hf://org/name`.

    Raises:
        InputError: there is no adapter, it is damaged, has an unsupported option, or does not fit the model. The message lists
            missing and unexpected tensors.
    """
    if site_modules(model):
        raise InputError("the model bears adapters already: load onto the base.")
    config = read_peft_config(path)
    file = _open(adapter_folder(path))
    if file.path.name == WEIGHTS_NAME:
        check_digests(config.raw, read_digests(file.path, file), str(file.path.with_name(CONFIG_NAME)))
    base = copy_of(model)
    names = _names(base, config, file)
    plan = _plan(names, config, file)
    arrays = {key: _read(file, key) for key in file.names() if key not in plan.idle | plan.spare}
    _check_spare(plan, file, arrays)
    for key, parameter in (plan.values | plan.copies).items():
        if key in arrays:
            parameter.write(arrays[key])
    saved = sorted(plan.saved)
    ours = section_of(config)
    member = ResolvedAdapter(ours.model_copy(update={"modules_to_save": saved}), _resolved(plan.sites))
    adapted = inject_layout(base, unite(base, [member]))
    _freeze_unsaved(adapted, plan.saved)
    _fill(adapted, member, plan.sites, arrays)
    copies = sorted(key for key in plan.copies if key in arrays)
    idle = {key: _read(file, key).tolist() for key in sorted(plan.idle & set(file.names())) if ".original_module." in key}
    foreign = {"peft": config.raw, "renaming": dataclasses.astuple(names.renaming), "copies": copies, "idle": idle}
    remember(adapted, ours, json.dumps(foreign))
    return adapted


def _freeze_unsaved(adapted: nnx.Module, saved: set[str]) -> None:
    """Of a head, PEFT trains the modules that it saves; the others are as the base has them."""
    for path, variable in nnx.iter_graph(adapted):
        if isinstance(variable, nnx.Variable) and variable.get_metadata().get(LABEL) == "head" and logical_name(path[:-1]) not in saved:
            variable.set_metadata(LABEL, FROZEN)


def _open(folder: Path) -> Checkpoint:
    index = folder / f"{WEIGHTS_NAME}.index.json"
    file = index if index.is_file() else folder / WEIGHTS_NAME
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            f"{folder}: no {WEIGHTS_NAME}"
            + (
                ": adapter_model.bin is a pickle, which can run code and is never loaded; PEFT's save_pretrained writes safetensors."
                if pickled
                else "."
            )
        )
    return SafetensorsCheckpoint(file, None)


def _names(base: nnx.Module, config: PeftConfig, file: Checkpoint) -> PeftNames:
    """PEFT's names of a base. A vocabulary projection that shares the embedding's weights gets its own where the adapter parts them."""
    stems = [m for key in file.names() if (m := module_of_key(key)) is not None]
    names = PeftNames(base, stems)
    decoder = next((m for _, m in nnx.iter_modules(base) if isinstance(m, Decoder)), None)
    if decoder is None or not decoder.config.tied:
        return names
    embed = next(p.name for p in names.parameters.values() if p.variable is decoder.embed.embedding)
    apart = config.saves(embed.removesuffix(".weight")) or config.saves(PROJECTION) or config.adapts(PROJECTION, linear=False)
    if apart or f"{ROOT}{PROJECTION}.weight" in file:
        decoder.untie()
        return PeftNames(base, stems)
    return names


def _plan(names: PeftNames, config: PeftConfig, file: Checkpoint) -> _Plan:
    plan = _Plan([], {}, {}, set(), set(), set())
    chosen = {name: m for name, m in names.modules.items() if config.adapts(name, linear=m.linear, parameter=m.parameter)}
    for module in chosen.values():
        plan.sites.append(_Site(module, *config.size(module.name), *factor_keys(module, chosen)))
    parameters = [m.name for m in names.modules.values() if m.parameter]
    for wanted in config.parameters:
        if not any(n == wanted or n.endswith(f".{wanted}") for n in parameters):
            raise InputError(
                f"{file.path.parent}: 'target_parameters' names {wanted!r}, and the model has no such parameter of experts or a router. "
                f"{hint(wanted, sorted({n.rpartition('.')[2] for n in parameters}))}".rstrip()
            )
    if not plan.sites:
        raise InputError(f"{file.path.parent}: 'target_modules' matches no module of the model. {_suggest(config, names)}")
    adapted = {s.module.name for s in plan.sites}
    for name, parameter in names.parameters.items():
        module, _, kind = name.rpartition(".")
        inner = f"{ROOT}{module}.base_layer.{kind}" if module in adapted else ROOT + name
        if config.saves_part_of(module):
            plan.values[ROOT + name] = parameter
            plan.saved.add(parameter.module)
            wrapped = {f"{ROOT}{module}.{wrapper}.{kind}" for wrapper in ("modules_to_save", "original_module")}
            if config.bias == "all" and kind == "bias":
                plan.idle |= wrapped
            elif _is_vocabulary(parameter):
                plan.spare |= wrapped
        elif kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in adapted)):
            plan.values[inner] = parameter
        elif _is_vocabulary(parameter):
            plan.copies[inner] = parameter
    _check_whole(plan, names, file)
    _check(plan, file)
    return plan


def _is_vocabulary(parameter: Parameter) -> bool:
    """Whether it is of the embedding or of the projection to the vocabulary, of which PEFT's files may hold copies."""
    return parameter.module.rsplit(".", 1)[-1] in ("embed", "lm_head")


def _check_spare(plan: _Plan, file: Checkpoint, arrays: dict[str, np.ndarray]) -> None:
    """`InputError` where a file holds a saved weight twice, and not the same numbers."""
    for key in sorted(plan.spare & set(file.names())):
        saved = key.replace(".modules_to_save.", ".")
        if saved != key and not np.array_equal(_read(file, key), arrays[saved]):
            raise InputError(f"{file.path}: '{key}' and '{saved}' are one weight in PEFT, and hold other numbers here.")


def _check_whole(plan: _Plan, names: PeftNames, file: Checkpoint) -> None:
    """`InputError` where a module is saved in some layers alone: here its layers train together or not at all."""
    for parameter in names.parameters.values():
        if parameter.module in plan.saved and ROOT + parameter.name not in plan.values:
            raise InputError(
                f"{file.path.parent}: 'modules_to_save' saves {parameter.module} in some layers and not in {parameter.name}; "
                "that is not supported."
            )


def _suggest(config: PeftConfig, names: PeftNames) -> str:
    endings = sorted({m.rsplit(".", 1)[-1] for m in names.modules})
    words = [config.targets] if isinstance(config.targets, str) else list(config.targets or ())
    near = [n for w in words[:_SHOWN] for n in nearest(w, endings, count=1)] or endings[:20]
    return f"Nearest names: {', '.join(dict.fromkeys(near))}. Full paths look like {', '.join(list(names.modules)[:2])}."


def _check(plan: _Plan, file: Checkpoint) -> None:
    """`InputError` unless the file holds what the plan wants, in these shapes, and nothing else."""
    wanted, there = plan.shapes(), set(file.names())
    known = wanted.keys() | plan.copies.keys() | plan.idle | plan.spare
    for what, keys in (("missing", wanted.keys() - there), ("too many for this config and model", there - known)):
        if keys:
            some = sorted(keys)
            shown = ", ".join(some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
            raise InputError(f"{file.path}: {len(some)} tensor{'s are' if len(some) > 1 else ' is'} {what}: {shown}.")
    for key, shape in (wanted | {k: p.shape for k, p in plan.copies.items() if k in there}).items():
        if file.shape(key) != shape:
            raise InputError(f"{file.path}: '{key}' has shape {file.shape(key)}, the config and the model ask for {shape}.")
        if str(file.dtype(key)) not in _READABLE:
            raise InputError(f"{file.path}: '{key}' has dtype {file.dtype(key)}; factors are {', '.join(_READABLE)}.")


def _read(file: Checkpoint, key: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = file.read(key).astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{file.path}: '{key}' holds numbers that are not finite.")
    return array


def _resolved(sites: list[_Site]) -> dict[str, ResolvedSite]:
    found: dict[str, ResolvedSite] = {}
    for one in sites:
        site = one.module.site
        if site.name not in found:
            found[site.name] = ResolvedSite(np.zeros(len(site.names), int), {"scale": np.zeros(len(site.names), np.float32)})
        found[site.name].ranks[one.module.layer] = one.rank
        found[site.name].settings["scale"][one.module.layer] = one.scale
    return found


def _fill(adapted: nnx.Module, member: ResolvedAdapter, sites: list[_Site], arrays: dict[str, np.ndarray]) -> None:
    """Puts the factors where they belong, in place: a rank below the stack's largest leaves the rest 0."""
    by_site: dict[str, list[_Site]] = {}
    for one in sites:
        by_site.setdefault(one.module.site.name, []).append(one)
    for name, module in site_modules(adapted).items():
        factors = Factors.of(module)
        for one in by_site[name]:
            # A segment holds its layers up to the top of the stack.
            layer = one.module.layer - (len(one.module.site.names) - len(factors.scale))
            a, b = from_file(arrays[one.a], arrays[one.b], one.module.site.experts)
            factors.a[layer][..., : one.rank] = a
            factors.b[layer][..., : one.rank, :] = b
            factors.scale[layer] = one.scale
        factors.put(module)
        module.ranks = nnx.static(tuple(int(r) for r in member.sites[name].ranks[-len(module.ranks) :]))
        module.deterministic = True
        if hasattr(module, "dropout_rate"):
            module.dropout_rate.set_value(jnp.full(module.dropout_rate.shape, member.config.dropout, jnp.float32))
