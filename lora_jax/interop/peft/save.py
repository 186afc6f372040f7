"""`save_peft`: an adapted model to the two files of a PEFT adapter.

The config that is written is the one the adapter came with, where it says of every module what the model computes; else one that
names modules, ranks and alphas outright.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from ...adapters.merge import plain, strip, unmerge
from ...adapters.sites import Site
from ...config.doors import EXPORTERS, METHODS
from ...config.patterns import Patterns
from ...errors import InputError
from ...models.heads import Classifier
from ...sweeps.restore import Restored
from ...tracking.files import new_folder
from ...weights.safetensors import Tensor, write_safetensors
from ..card import model_card, public_name, write_card
from ..export import Exporter, ExportOptions
from ..hf import save_pretrained
from .adapter import AdaptedModule, Adapter
from .config import CONFIG_NAME, WEIGHTS_NAME, PeftConfig, config_values, new_config, option_digests, said_places, to_json
from .names import PROJECTION, ROOT, SHARED, tensor_key, trained_key


def save_peft(model: nnx.Module, path: str | Path, *, base: str | None = None, card: str | None = None) -> None:
    """Writes an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, float32.

    The header of the tensors' file holds digests of them and of the config, by which `load_peft` knows damage; PEFT passes them over.
    Padded ranks are trimmed. An adapter from `load_peft` keeps its config and the bits of its tensors.

    Args:
        model: an adapted model from `inject`, `load_peft` or `training`.
        path: a folder that does not exist yet, or is empty.
        base: the base's name in the config (`base_model_name_or_path`). Default: its name in the loaded adapter's config, or the
            source the base was loaded from.
        card: text of a `README.md`.

    Raises:
        InputError: the model has no adapter, PEFT cannot hold what it is adapted by, or `path` is not empty.
    """
    adapter = Adapter(unmerge(model))
    with new_folder(Path(path)) as folder:
        _write(adapter, folder, base)
        write_card(folder, card)


def _write(adapter: Adapter, folder: Path, base: str | None) -> None:
    config, peft = _config(adapter)
    if base is not None:
        config = config | {"base_model_name_or_path": base}
    elif config.get("base_model_name_or_path") is None:
        config = config | _source(adapter)
    (folder / CONFIG_NAME).write_text(to_json(config), encoding="utf-8")
    tensors = _tensors(adapter, peft)
    write_safetensors(folder / WEIGHTS_NAME, dict(sorted(tensors.items())), digests=option_digests(adapter.form, config))


def config_of_model(model: nnx.Module) -> dict[str, Any]:
    """The contents of PEFT's `adapter_config.json` for an adapted model.

    Raises:
        InputError: PEFT cannot express what the model is adapted by.
    """
    return _config(Adapter(model))[0]


# The config


def _config(adapter: Adapter) -> tuple[dict[str, Any], PeftConfig]:
    """PEFT's config, as it is written and as it is read."""
    for make in (_as_loaded, _as_asked, _outright):
        raw = make(adapter)
        if raw is None:
            continue
        raw = json.loads(to_json(raw))  # with the order of keys that it will have when it is read
        peft = PeftConfig.parse(raw, CONFIG_NAME)
        if _says(peft, adapter):
            return raw, peft
    lacks = [key for key in ("rank_pattern", "alpha_pattern") if key not in adapter.form.words]
    raise InputError(
        f"PEFT's type {adapter.form.peft_type} cannot say what the adapter is at every module"
        + (f": it has no {' and no '.join(lacks)}, and the modules differ." if lacks else ".")
    )


def _says(peft: PeftConfig, adapter: Adapter) -> bool:
    """Whether a config means what the model computes, at every module."""
    if peft.form is not adapter.form:  # methods that differ in how they train may have one form
        return False
    sites = {s.module.name: s for s in adapter.sites}
    for name, module in adapter.names.modules.items():
        site = sites.get(name)
        meant = peft.adapts(name, linear=module.linear, parameter=module.parameter)
        rank, settings = peft.size(name, module.site) if meant else (0, {})
        if (rank > 0) != (site is not None):
            return False
        if site is not None and not _fits(adapter, site, rank, settings):
            return False
    replaced = {p.name for p in adapter.replaced}
    if any(adapter.form.modules and peft.adapts(n.rpartition(".")[0], linear=False) != (n in replaced) for n in adapter.names.parameters):
        return False
    section = peft.placed({name: s.module.site for name, s in sites.items()})
    for name, site in sites.items():
        of = (site.module.site, peft.size(name, site.module.site)[0])
        if adapter.form.tensors(section, *of) != adapter.form.tensors(adapter.section, *of):
            return False
    saved = {p.name for p in adapter.saved}
    if any(peft.saves_part_of(n.rpartition(".")[0]) != (n in saved) for n in adapter.names.parameters):
        return False
    return not (adapter.shares_saved_embedding and not peft.saves(PROJECTION))


def _fits(adapter: Adapter, site: AdaptedModule, rank: int, settings: dict[str, float]) -> bool:
    """Whether a config's rank and settings are a site's: the rank may be larger than the numbers need."""
    if "rank" in adapter.form.words and not site.rank <= rank <= site.held.rank:
        return False
    return all(np.float32(settings[name]) == value for name, value in site.settings.items())


def _as_loaded(adapter: Adapter) -> dict[str, Any] | None:
    return adapter.foreign.get("peft")


def _as_asked(adapter: Adapter) -> dict[str, Any] | None:
    if not adapter.known:
        return None
    try:
        return config_values(adapter.method, adapter.section) | _facts(adapter)
    except InputError:  # it speaks of layers or modules in a way that PEFT does not
        return None


def _outright(adapter: Adapter) -> dict[str, Any]:
    """Every module by name, with numbers of its own where they are not the most common ones."""
    form = adapter.form
    ranks = _asked_ranks(adapter)
    alphas = {s.module.name: _alpha(adapter, s, ranks[s.module.name]) for s in adapter.sites}
    section = adapter.section
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] if v else own for v, own in ((ranks, section.rank), (alphas, section.alpha)))
    parameters = [s.module.name for s in adapter.sites if s.module.parameter]
    # PEFT looks for parameters among all of them.
    everything = adapter.names.parameters.keys() | adapter.names.modules.keys()
    numbers = {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "dropout": 0.0 if parameters or not adapter.known else adapter.section.dropout,
    }
    places = {
        "target_modules": _shortest([n for n in ranks if n not in parameters], adapter.names.modules.keys()) or _replaced(adapter),
        "target_parameters": _shortest(parameters, everything) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    fields = form.fields(adapter.section.model_copy(update=numbers)) | said_places(form, places)
    fields |= form.places(adapter.section, {s.module.name: s.module.site for s in adapter.sites})
    return new_config(form) | (adapter.foreign.get("peft") or {}) | fields | _facts(adapter)


def _replaced(adapter: Adapter) -> list[str]:
    """The modules of the base that the type trains as they are, by the ends of their names."""
    wanted, others = ([p.rpartition(".")[0] for p in some] for some in ([p.name for p in adapter.replaced], adapter.names.parameters))
    return _shortest(wanted, set(others))


def _asked_ranks(adapter: Adapter) -> dict[str, int]:
    """The ranks that the config asked for where they fit: trained numbers may happen to be 0."""
    found, config = {}, adapter.section
    for site in adapter.sites:
        asked = _of_pattern(config.rank_pattern, site, config.rank) if adapter.known else site.rank
        found[site.module.name] = int(asked) if site.rank <= asked <= site.held.rank else site.rank
    return found


def _of_pattern(values: dict[str, Any], site: AdaptedModule, default: float) -> float:
    """What the config asks for at a site: the value of the first pattern that matches the end of one of its names."""
    names, patterns = (*site.module.site.names[site.module.layer], site.module.name), Patterns("adapter")
    return next((v for p, v in values.items() for n in names if patterns.match(rf"(.*\.)?({p})", n)), default)


def _alpha(adapter: Adapter, site: AdaptedModule, rank: int) -> float:
    """An alpha that gives a site's settings bit for bit: the shortest number that gives its scale, 16 and not 15.999999."""
    method, section = adapter.method, adapter.section
    asked = _of_pattern(section.alpha_pattern, site, section.alpha)

    def gives(alpha: float) -> bool:
        return all(np.float32(v) == site.settings[n] for n, v in method.settings(section, rank, alpha).items())

    if gives(asked) or "scale" not in site.settings:
        return asked
    exact = float(site.settings["scale"]) / float(method.settings(section, rank, 1.0)["scale"])
    rounded = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((a for a in rounded if gives(a)), exact)


def _shortest(wanted: list[str], names: Collection[str]) -> list[str]:
    """The fewest, shortest ends of paths that mean these of the names and no others."""
    left, ends = set(wanted), []
    others = set(names) - left
    for name in wanted:
        if name not in left:
            continue
        parts = name.split(".")
        end = next(
            (e for i in range(1, len(parts) + 1) if not any(_ends(o, e := ".".join(parts[-i:])) for o in others)),
            name,
        )
        ends.append(end)
        left -= {n for n in left if _ends(n, end)}
    return sorted(ends)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _facts(adapter: Adapter) -> dict[str, Any]:
    """What is trained beside the sites, and what kind of model it is for.

    Raises:
        InputError: PEFT's type does not train such things.
    """
    biases = adapter.trained.get("bias", [])
    untrained = [p for p in adapter.trained.get("frozen", []) if p.name.endswith(".bias")]
    asked = adapter.section.bias
    bias = "none" if not biases else asked if asked != "none" else "lora_only" if untrained else "all"
    places = {"bias": adapter.form.only if bias == "lora_only" else bias, "modules_to_save": _saved_names(adapter) or None}
    return {
        "task_type": adapter.foreign.get("peft", {}).get("task_type") or (adapter.kind and adapter.kind.task_type),
    } | said_places(adapter.form, places)


def _saved_names(adapter: Adapter) -> list[str]:
    head = list(adapter.kind.head_modules) if adapter.kind else []
    names = {name for p in adapter.saved if not set(head) & set((name := p.name.rpartition(".")[0]).split("."))}
    if adapter.shares_saved_embedding:
        names.add(PROJECTION)
    return (head if adapter.trained.get("head") else []) + sorted(names)


def _source(adapter: Adapter) -> dict[str, Any]:
    """Where the base came from, as PEFT says it."""
    base: Any = next((m for _, m in nnx.iter_modules(adapter.model) if getattr(m, "origin", None) is not None), None)
    if base is None:
        return {"base_model_name_or_path": None}
    source = base.origin.source
    revision = source.partition("@")[2] if source.startswith("hf://") else ""
    return {"base_model_name_or_path": public_name(source)} | ({"revision": revision} if revision else {})


# The tensors


def _tensors(adapter: Adapter, config: PeftConfig) -> dict[str, Tensor]:
    form, section = adapter.form, adapter.section
    found: dict[str, Tensor] = {}
    adapted = {s.module.name for s in adapter.sites}
    ranks: dict[Site, int] = {}
    numbers = {name: number for number, name in enumerate(adapter.names.in_order(adapted))}
    for one in adapter.sites:
        site, rank, stem = one.module.site, config.size(one.module.name, one.module.site)[0], one.module.stem(adapted)
        ranks[site] = max(rank, ranks.get(site, 0))
        for name, array in form.to_file(section, site, rank, one.arrays(rank)).items():
            found[tensor_key(form, stem, name, numbers[one.module.name])] = _integers(array) if name in form.integers else _float32(array)
    shared = form.shared_to_file(section, ranks, adapter.whole(ranks))
    found |= {SHARED + name: _float32(array) for name, array in shared.items()}
    saved, replaced = ({p.name for p in some} for some in (adapter.saved, adapter.replaced))
    for parameter in adapter.names.parameters.values():
        module, _, kind = parameter.name.rpartition(".")
        inner = f"{ROOT}{module}.base_layer.{kind}" if module in adapted else ROOT + parameter.name
        trained_bias = kind == "bias" and config.trains_bias(module in adapted)
        if parameter.name in replaced:
            found[trained_key(form, parameter.name)] = _float32(parameter.read())
        elif parameter.name in saved:
            found[ROOT + parameter.name] = _float32(parameter.read())
        elif trained_bias or inner in adapter.foreign.get("copies", ()):
            found[inner] = _float32(parameter.read())
    if adapter.shares_saved_embedding:
        assert adapter.decoder is not None
        found[f"{ROOT}{PROJECTION}.weight"] = _float32(np.asarray(adapter.decoder.embed.embedding[...]))
    for key, value in adapter.foreign.get("idle", {}).items():
        found[key] = _float32(np.asarray(value, np.float32))
        copy = key.replace(".original_module.", ".modules_to_save.")
        found[copy] = found[copy.replace(".modules_to_save.", ".")]
    return found


def _float32(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array, np.float32)
    return Tensor(array.shape, array.dtype, lambda: array)


def _integers(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(np.rint(array), np.int32)
    return Tensor(array.shape, array.dtype, lambda: array)


class PeftExporter(Exporter):
    """An adapter in PEFT's format; one that began as a part of the base has twice the rank, or with `keep_base` a base of its own."""

    summary = "The adapter alone, float32, for PEFT."
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"keep_base": ()}

    def can(self, restored: Restored) -> str | None:
        """Why PEFT has no file for what was trained; None where it has."""
        name = restored.member.config.adapter.method
        if METHODS.get(name, "adapter.method").peft is None:
            return f"trained '{name}', which has no form in PEFT's files here."
        try:
            config_of_model(restored.model)
        except InputError as error:
            return str(error)
        return None

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Config, tensors and a model card."""
        model, source = restored.model, restored.member.config.model.source
        base = public_name(source) if source.startswith("hf://") else "PATH OF THE BASE"
        if options.keep_base:
            if (changed := plain(model, shifted=True)) is model:
                raise InputError(f"--keep-base: the init of member '{restored.member.name}' took nothing out of the base.")
            model, base, bare = changed, "PATH/base", strip(changed)
            save_pretrained(bare.base if isinstance(bare, Classifier) else bare, folder / "base", dtype="float32")
        adapter = Adapter(model)
        _write(adapter, folder, "base" if options.keep_base else None)
        auto = adapter.kind.auto_class if adapter.kind else "AutoModel"
        labels = f", num_labels={len(restored.classes)}" if restored.classes and adapter.kind and adapter.kind.head_modules else ""
        usage = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(base)}{labels})",
            'model = PeftModel.from_pretrained(base, "PATH")',
        ]
        summary = "An adapter for `{base}`, in PEFT's format."
        write_card(folder, model_card(restored, library="peft", relation="adapter", summary=summary, usage=usage))


EXPORTERS.register("peft", PeftExporter())
