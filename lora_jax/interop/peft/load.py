"""`load_peft`: a PEFT adapter onto a base.

The config says which tensors the file must hold and of which shapes. Nothing is allocated before every one of them is known to be
there, and no other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...adapters.contraction import GENERAL, flat_kernel
from ...adapters.inject import LABEL, inject_layout, remember, site_modules
from ...adapters.labels import FROZEN
from ...adapters.layout import ResolvedAdapter, ResolvedSite, unite
from ...adapters.merge import copy_of
from ...adapters.methods.base import AdaptedSite
from ...adapters.methods.peft_form import PeftForm
from ...adapters.sites import Site, logical_name
from ...config.schema import AdapterConfig
from ...errors import InputError, hint, nearest
from ...models.encoder_decoder import Generative
from ...weights.checkpoint import Checkpoint
from ...weights.safetensors import SafetensorsCheckpoint, read_digests
from .config import CONFIG_NAME, WEIGHTS_NAME, PeftConfig, adapter_folder, check_digests, read_peft_config
from .names import PROJECTION, ROOT, SHARED, Module, Parameter, PeftNames, module_of_key, tensor_key, trained_key, unfit

_SHOWN = 6
_INTEGERS = ("int32", "int64")
_READABLE = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class _Site:
    """An adapted module.

    Attributes:
        module: the module.
        rank, settings: as the config says.
        tensors: name -> shape, of its tensors in the file.
        keys: name -> key, of the same.
        stem: what comes before a name in most keys, up to the dot.
    """

    module: Module
    rank: int
    settings: dict[str, float]
    tensors: dict[str, tuple[int, ...]]
    keys: dict[str, str]
    stem: str


@dataclasses.dataclass
class _Plan:
    """What is to be read.

    Attributes:
        section: the adapter section that asks for the same.
        sites: the adapted modules.
        shared: key -> shape, of the tensors that belong to no module.
        values: key -> weight of the base that it stands for: saved modules, trained biases, and what the type trains in their place.
        copies: the same, of weights that a file may hold and need not: PEFT adds the embeddings where one is adapted.
        saved: our names of the modules that are saved.
        trained: our names of the modules that the type trains, where it adapts no site.
        idle: keys that PEFT writes beside these and that change nothing (`bias: all` copies a saved module's bias).
        spare: further ones, of saved embeddings and projections (`save_embedding_layers`), which are not written again.
    """

    section: AdapterConfig
    sites: list[_Site]
    shared: dict[str, tuple[int, ...]]
    values: dict[str, Parameter]
    copies: dict[str, Parameter]
    saved: set[str]
    trained: set[str]
    idle: set[str]
    spare: set[str]

    def repeated(self, form: PeftForm) -> dict[str, str]:
        """Key -> the key of the shared tensor that a file repeats there."""
        return {f"{stem}.{name}": SHARED + name for stem in [one.stem for one in self.sites] for name in form.repeated}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of all that must be there."""
        shapes = {key: p.shape for key, p in self.values.items()} | self.shared
        for site in self.sites:
            shapes |= {site.keys[name]: shape for name, shape in site.tensors.items()}
        return shapes

    def ranks(self) -> dict[Site, int]:
        """Each adapted site, with its largest rank."""
        found: dict[Site, int] = {}
        for one in self.sites:
            found[one.module.site] = max(one.rank, found.get(one.module.site, 0))
        return found


def load_peft(model: nnx.Module, path: str | Path) -> nnx.Module:
    """A copy of `model` with a PEFT adapter. `model` itself is unchanged, and both share the base's arrays.

    The config says the method. Scales are computed from it for each module, as PEFT does. As with PEFT's `from_pretrained` the
    result is for inference: dropout is off until `nnx.view(adapted, deterministic=False)`.

    Args:
        model: the base without adapters; with a head if the adapter contains one.
        path: the adapter's folder, or `hf://org/name`.

    Raises:
        InputError: there is no adapter, it is damaged, has an unsupported option, or does not fit the model. The message lists
            missing and unexpected tensors.
    """
    if site_modules(model):
        raise InputError("the model already has adapters: load onto the base.")
    config = read_peft_config(path)
    file = _open(adapter_folder(path))
    if file.path.name == WEIGHTS_NAME:
        check_digests(config, read_digests(file.path, file), str(file.path.with_name(CONFIG_NAME)))
    base = copy_of(model)
    names = _names(base, config, file)
    plan = _plan(names, config, file)
    repeated = plan.repeated(config.form)
    arrays = {key: _read(file, key) for key in file.names() if key not in plan.idle | plan.spare | repeated.keys()}
    _check_spare({key: saved for key in plan.spare if (saved := key.replace(".modules_to_save.", ".")) != key} | repeated, file, arrays)
    for key, parameter in (plan.values | plan.copies).items():
        if key in arrays:
            parameter.write(arrays[key])
    saved = sorted(plan.saved)
    member = ResolvedAdapter(plan.section.model_copy(update={"modules_to_save": saved}), _resolved(plan.sites))
    adapted = inject_layout(base, unite(base, [member]))
    _freeze_unsaved(adapted, plan.saved, plan.trained)
    _fill(adapted, member, plan, config, arrays)
    copies = sorted(key for key in plan.copies if key in arrays)
    idle = {key: _read(file, key).tolist() for key in sorted(plan.idle & set(file.names())) if ".original_module." in key}
    foreign = {"peft": config.raw, "renaming": dataclasses.astuple(names.renaming), "copies": copies, "idle": idle}
    remember(adapted, plan.section, json.dumps(foreign))
    return adapted


def _freeze_unsaved(adapted: nnx.Module, saved: set[str], trained: set[str]) -> None:
    """Of a head, and of the norms, PEFT trains the modules that are in the file; the others are as the base has them."""
    kept = {"head": saved, "norm": saved | trained}
    for path, variable in nnx.iter_graph(adapted):
        label = variable.get_metadata().get(LABEL) if isinstance(variable, nnx.Variable) else None
        if label in kept and logical_name(path[:-1]) not in kept[label]:
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
    stems = [m for key in file.names() if (m := module_of_key(key, config.form.prefix)) is not None]
    names = PeftNames(base, stems)
    decoder = next((m for _, m in nnx.iter_modules(base) if isinstance(m, Generative)), None)
    if decoder is None or not decoder.config.tied:
        return names
    embed = next(p.name for p in names.parameters.values() if p.variable is decoder.embed.embedding)
    apart = config.saves(embed.removesuffix(".weight")) or config.saves(PROJECTION) or config.adapts(PROJECTION, linear=False)
    if apart or f"{ROOT}{PROJECTION}.weight" in file:
        decoder.untie()
        return PeftNames(base, stems)
    return names


def _plan(names: PeftNames, config: PeftConfig, file: Checkpoint) -> _Plan:
    chosen = {name: m for name, m in names.modules.items() if config.adapts(name, linear=m.linear, parameter=m.parameter)}
    for module in chosen.values():
        _check_kind(module, config, file)
    section = config.placed({name: m.site for name, m in chosen.items()})
    plan = _Plan(section, [], {}, {}, {}, set(), set(), set(), set())
    numbers = {name: number for number, name in enumerate(names.in_order(chosen))}
    for name, module in chosen.items():
        rank, settings = config.size(name, module.site)
        _check_size(config, section, module, rank, file)
        tensors = config.form.tensors(section, module.site, rank)
        stem = module.stem(chosen)
        keys = {tensor: tensor_key(config.form, stem, tensor, numbers[name]) for tensor in tensors}
        plan.sites.append(_Site(module, rank, settings, tensors, keys, stem))
    plan.shared |= {SHARED + name: shape for name, shape in config.form.shared(section, plan.ranks()).items()}
    parameters = [m.name for m in names.modules.values() if m.parameter]
    for wanted in config.parameters:
        if not any(n == wanted or n.endswith(f".{wanted}") for n in parameters):
            raise InputError(
                f"{file.path.parent}: 'target_parameters' names {wanted!r}, and the model has no such parameter of experts or a router. "
                f"{hint(wanted, sorted({n.rpartition('.')[2] for n in parameters}))}".rstrip()
            )
    replaced = _replaced(names, config, file)
    plan.trained |= {p.module for p in replaced.values()}
    if not plan.sites and not replaced:
        raise InputError(f"{file.path.parent}: 'target_modules' matches no module of the model. {_suggest(config, names)}")
    adapted = {s.module.name for s in plan.sites}
    for name, parameter in names.parameters.items():
        module, _, kind = name.rpartition(".")
        inner = f"{ROOT}{module}.base_layer.{kind}" if module in adapted else ROOT + name
        if name in replaced:
            plan.values[trained_key(config.form, name)] = parameter
        elif config.saves_part_of(module):
            plan.values[ROOT + name] = parameter
            plan.saved.add(parameter.module)
            wrapped = {f"{ROOT}{module}.{wrapper}.{kind}" for wrapper in ("modules_to_save", "original_module")}
            if config.section.bias == "all" and kind == "bias":
                plan.idle |= wrapped
            elif _is_vocabulary(parameter):
                plan.spare |= wrapped
        elif kind == "bias" and config.trains_bias(module in adapted):
            plan.values[inner] = parameter
        elif _is_vocabulary(parameter):
            plan.copies[inner] = parameter
    _check_whole(plan, names, file)
    _check(plan, config, file)
    return plan


def _check_size(config: PeftConfig, section: AdapterConfig, module: Module, rank: int, file: Checkpoint) -> None:
    """`InputError` where the method cannot do at a module what the config asks for."""
    try:
        if rank:
            config.method.check(section, module.site, rank)
    except InputError as error:
        raise InputError(f"{file.path.parent}: {error}") from None


def _replaced(names: PeftNames, config: PeftConfig, file: Checkpoint) -> dict[str, Parameter]:
    """Of a type that trains modules of the base as they are (`PeftForm.modules`): name -> weight, of the modules that the config means.

    Raises:
        InputError: it means a module of another kind, or one in some layers alone: here its layers train together or not at all.
    """
    if not config.form.modules:
        return {}
    found = {n: p for n, p in names.parameters.items() if config.adapts(n.rpartition(".")[0], linear=False)}
    for name, parameter in names.parameters.items():
        module = name.rpartition(".")[0]
        if name in found and re.fullmatch(config.form.modules, parameter.module) is None:
            raise InputError(f"{file.path.parent}: '{config.method.name}' does not train {module}, which 'target_modules' means.")
        if name not in found and any(p.module == parameter.module for p in found.values()):
            raise InputError(f"{file.path.parent}: 'target_modules' means layers of {parameter.module} and not {module}; not supported.")
    return found


def _check_kind(module: Module, config: PeftConfig, file: Checkpoint) -> None:
    """`InputError` where the method, or PEFT's type, adapts no such module."""
    method = config.method
    if config.form.modules:
        raise InputError(f"{file.path.parent}: '{method.name}' does not train {module.name}, which 'target_modules' means.")
    if module.site.kind not in method.kinds:
        raise InputError(f"{file.path.parent}: '{method.name}' adapts {' and '.join(method.kinds)} sites, and {module.name} is none.")
    if why := unfit(config.form, module):
        raise InputError(f"{file.path.parent}: {why}.")
    if module.conv1d and not config.form.conv1d:
        raise InputError(f"{file.path.parent}: {module.name} is a Conv1D, which PEFT's type {config.form.peft_type} does not adapt.")


def _is_vocabulary(parameter: Parameter) -> bool:
    """Whether it is of the embedding or of the projection to the vocabulary, of which PEFT's files may hold copies."""
    return parameter.module.rsplit(".", 1)[-1] in ("embed", "lm_head")


def _check_spare(spare: dict[str, str], file: Checkpoint, arrays: dict[str, np.ndarray]) -> None:
    """`InputError` where a file holds a tensor twice, and not the same numbers.

    Args:
        spare: key -> the key of the same tensor.
        file: holds them.
        arrays: what was read of it.
    """
    for key in sorted(spare.keys() & set(file.names())):
        kept = spare[key]
        if kept not in arrays or not np.array_equal(_read(file, key), arrays[kept]):
            raise InputError(f"{file.path}: '{key}' and '{kept}' are one weight in PEFT, but hold different numbers here.")


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


def _check(plan: _Plan, config: PeftConfig, file: Checkpoint) -> None:
    """`InputError` unless the file holds what the plan wants, in these shapes, and nothing else."""
    form, wanted, there = config.form, plan.shapes(), set(file.names())
    optional = {f"{stem}.{name}" for stem in [s.stem for s in plan.sites] for name in form.optional} | {SHARED + n for n in form.optional}
    known = wanted.keys() | plan.copies.keys() | plan.idle | plan.spare | plan.repeated(form).keys()
    for what, keys in (("missing", wanted.keys() - optional - there), ("too many for this config and model", there - known)):
        if keys:
            some = sorted(keys)
            shown = ", ".join(some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
            raise InputError(f"{file.path}: {len(some)} tensor{'s are' if len(some) > 1 else ' is'} {what}: {shown}.")
    integers = {f"{stem}.{name}" for stem in [s.stem for s in plan.sites] for name in form.integers}
    for key, shape in (wanted | {k: p.shape for k, p in plan.copies.items()}).items():
        if key not in there:
            continue
        if file.shape(key) != shape:
            raise InputError(f"{file.path}: '{key}' has shape {file.shape(key)}, the config and the model ask for {shape}.")
        readable = (*_READABLE, *_INTEGERS) if key in integers else _READABLE
        if str(file.dtype(key)) not in readable:
            raise InputError(f"{file.path}: '{key}' has dtype {file.dtype(key)}; it should be {', '.join(readable)}.")


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
            found[site.name] = ResolvedSite(np.zeros(len(site.names), int), {})
        found[site.name].ranks[one.module.layer] = one.rank
        for name, value in one.settings.items():
            found[site.name].settings.setdefault(name, np.zeros(len(site.names), np.float32))[one.module.layer] = value
    return {name: site for name, site in found.items() if site.ranks.any()}


def _fill(adapted: nnx.Module, member: ResolvedAdapter, plan: _Plan, config: PeftConfig, arrays: dict[str, np.ndarray]) -> None:
    """Puts the arrays where they belong, in place: a rank below the stack's largest leaves the rest at its fill value."""
    form, modules = config.form, site_modules(adapted)
    by_site: dict[str, list[_Site]] = {}
    for one in plan.sites:
        by_site.setdefault(one.module.site.name, []).append(one)
    shared = {key.removeprefix(SHARED): array for key, array in arrays.items() if key in plan.shared}
    whole = form.shared_from_file(plan.section, plan.ranks(), shared)
    for name, module in modules.items():
        layers = len(module.ranks)
        filled: dict[str, np.ndarray] = {}
        for one in by_site[name]:
            if one.rank == 0:
                continue
            # A segment holds its layers up to the top of the stack.
            layer = one.module.layer - (len(one.module.site.names) - layers)
            tensors = {n: arrays[key] for n in one.tensors if (key := one.keys[n]) in arrays}
            weight = functools.partial(_weight, module, layer)
            own = form.from_file(plan.section, one.module.site, one.rank, tensors, weight)
            for parameter, value in (one.settings | own).items():
                if parameter not in filled:
                    held = np.array(getattr(module, parameter)[...])
                    filled[parameter] = held if module.stacked else held[None]
                filled[parameter][(layer, *(slice(n) for n in np.shape(value)))] = value
        module.fill(filled)
        for parameter, value in whole.items():
            if hasattr(module, parameter):
                held = np.array(getattr(module, parameter)[...])
                held[tuple(slice(n) for n in value.shape)] = value
                getattr(module, parameter).set_value(jnp.asarray(held))
        module.ranks = nnx.static(tuple(int(r) for r in member.sites[name].ranks[-layers:]))
        module.deterministic = True
        if hasattr(module, "dropout_rate"):
            module.dropout_rate.set_value(jnp.full(module.dropout_rate.shape, member.config.dropout, jnp.float32))


def _weight(module: AdaptedSite, layer: int) -> np.ndarray:
    """The base's weight of one of the layers that a site has arrays for, (inputs, outputs) float32, the experts in front."""
    weight = np.asarray(getattr(module.base, module.weight)[...], np.float32)
    weight = weight[layer - len(module.ranks)] if module.stacked else weight
    return flat_kernel(module.base, weight) if isinstance(module.base, GENERAL) else weight
