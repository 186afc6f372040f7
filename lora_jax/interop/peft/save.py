"""`save_peft`: an adapted model to the two files of a PEFT adapter.

The config that is written is the one the adapter came with, where it says of every module what the model computes; else one that
names modules, ranks and alphas outright.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from pydantic import PrivateAttr, ValidationError

from ...adapters.inject import LABEL, inject, recall, site_modules
from ...adapters.merge import strip, unmerge
from ...adapters.methods.lora import LoraSection
from ...config.doors import EXPORTERS
from ...config.patterns import Patterns
from ...errors import InputError
from ...models.decoder import Decoder
from ...sweeps.restore import Restored
from ...tracking.files import new_folder
from ...weights.safetensors import Tensor, write_safetensors
from ..card import model_card, public_name, write_card
from ..export import Exporter, ExportOptions, kind_of
from .config import CONFIG_NAME, DEFAULTS, WEIGHTS_NAME, PeftConfig, option_digests, read_peft_config, to_json
from .lora import Factors, alpha_of, config_values, factor_keys, in_our_words, plain, section_of, section_of_record, to_file, wrong_values
from .names import PROJECTION, ROOT, Module, Parameter, PeftNames, Renaming


@dataclasses.dataclass(frozen=True)
class _Site:
    """What a model computes at one module.

    Attributes:
        a, b: (inputs, rank) and (rank, outputs), padding and all; of experts with an axis of them before.
        scale: float32.
        rank: the least that holds all numbers that are not 0.
    """

    module: Module
    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    rank: int


class _Adapter:
    """An adapted model as PEFT sees it.

    Attributes:
        section: the config that it was adapted by, where it is known.
        foreign: what else the file that it was loaded from held; empty for an adapter made here.
        kind: of the model, as Hugging Face calls it.
        names: PEFT's names.
        sites: the modules with adapters.
        trained: label -> weights of the base.
        decoder: in the model, if there is one.
    """

    def __init__(self, model: nnx.Module):
        self.model = model
        record = recall(model)
        self.foreign: dict[str, Any] = json.loads(record.foreign) if record and record.foreign else {}
        self.kind = kind_of(model)
        base = strip(model)
        renaming = Renaming(*self.foreign["renaming"]) if self.foreign else None
        self.names = PeftNames(base, renaming=renaming)
        self.sites = _sites(model, self.names)
        if not self.sites:
            raise InputError("the model has no adapter that PEFT could hold.")
        self.section = None if record is None else section_of_record(record.config)
        self.trained: dict[str, list[Parameter]] = {}
        for parameter in self.names.parameters.values():
            label = parameter.variable.get_metadata().get(LABEL, "frozen")
            self.trained.setdefault(label, []).append(parameter)
        self.decoder = next((m for _, m in nnx.iter_modules(base) if isinstance(m, Decoder)), None)

    @property
    def saved(self) -> list[Parameter]:
        """Weights of modules that were trained in full, a new head's among them."""
        return [p for label in ("head", "saved", "full", "norm") for p in self.trained.get(label, [])]


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
        InputError: the model has no low-rank adapter, or `path` is not empty.
    """
    adapter = _Adapter(unmerge(model))
    with new_folder(Path(path)) as folder:
        _write(adapter, folder, base)
        write_card(folder, card)


def _write(adapter: _Adapter, folder: Path, base: str | None) -> None:
    config, ranks = _config(adapter)
    if base is not None:
        config = config | {"base_model_name_or_path": base}
    elif config.get("base_model_name_or_path") is None:
        config = config | _source(adapter)
    (folder / CONFIG_NAME).write_text(to_json(config), encoding="utf-8")
    tensors = _tensors(adapter, PeftConfig.parse(config, CONFIG_NAME), ranks)
    write_safetensors(folder / WEIGHTS_NAME, dict(sorted(tensors.items())), digests=option_digests(config))


class LoraConfig(LoraSection):
    """LoRA's config section, which reads and writes PEFT's config. PEFT's words (`r`, `lora_alpha`, `target_modules`, ...) are taken too.

    Raises:
        InputError: there is no such key, or a value will not do.

    >>> config = LoraConfig(rank=4, alpha=8, targets=["q_proj"])
    >>> config.to_peft()["lora_alpha"], config.to_peft()["target_modules"]
    (8, ['q_proj'])
    """

    # The file that it was read from: what has no key here (task_type, revision, ...) is written again.
    _peft: dict[str, Any] | None = PrivateAttr(None)

    def __init__(self, **values: Any):
        try:
            super().__init__(**in_our_words(values))
        except ValidationError as error:
            raise wrong_values(error) from None

    @classmethod
    def from_peft(cls, path: str | Path) -> LoraConfig:
        """The config of a PEFT adapter.

        Args:
            path: its folder, the `adapter_config.json` in it, or `hf://org/name`.

        Raises:
            InputError: there is no config, it is damaged, or it has an unsupported option.
        """
        peft = read_peft_config(path)
        config = cls(**section_of(peft).model_dump())
        config._peft = peft.raw
        return config

    def to_peft(self, model: nnx.Module | None = None) -> dict[str, Any]:
        """The contents of PEFT's `adapter_config.json`; `peft.LoraConfig(**config.to_peft())` is the same config.

        Args:
            model: the base; required if the config names layers or modules in a way that PEFT does not have (`attention`, `last:4`).

        Raises:
            InputError: a model is required, or PEFT cannot express the config.
        """
        if model is None:
            return config_values(self, self._peft)
        return _config(_Adapter(inject(model, self, rngs=nnx.Rngs(0))))[0]


def _sites(model: nnx.Module, names: PeftNames) -> list[_Site]:
    by_place = {(m.site.name, m.layer): m for m in names.modules.values()}
    found = []
    for name, module in site_modules(model).items():
        factors = Factors.of(module)
        first = len(by_place[name, 0].site.names) - len(factors.scale)
        for i, scale in enumerate(factors.scale):
            if scale != 0:
                found.append(_Site(by_place[name, first + i], factors.a[i], factors.b[i], scale, factors.used_rank(i)))
    return sorted(found, key=lambda s: list(names.modules).index(s.module.name))


# The config


def _config(adapter: _Adapter) -> tuple[dict[str, Any], dict[str, int]]:
    """PEFT's config, and the rank of each module."""
    for make in (_as_loaded, _as_asked, _outright):
        raw = make(adapter)
        if raw is None:
            continue
        raw = json.loads(to_json(raw))  # with the order of keys that it will have when it is read
        peft = PeftConfig.parse(raw, CONFIG_NAME)
        if _says(peft, adapter):
            return raw, {s.module.name: peft.size(s.module.name)[0] for s in adapter.sites}
    raise RuntimeError("the config that names every module does not say what the model computes")


def _says(peft: PeftConfig, adapter: _Adapter) -> bool:
    """Whether a config means what the model computes, at every module."""
    sites = {s.module.name: s for s in adapter.sites}
    for name, module in adapter.names.modules.items():
        site = sites.get(name)
        if peft.adapts(name, linear=module.linear, parameter=module.parameter) != (site is not None):
            return False
        if site is not None:
            rank, scale = peft.size(name)
            if not site.rank <= rank <= site.a.shape[-1] or np.float32(scale) != site.scale:
                return False
    saved = {p.name for p in adapter.saved}
    if any(peft.saves_part_of(n.rpartition(".")[0]) != (n in saved) for n in adapter.names.parameters):
        return False
    return not (_shares_saved_embedding(adapter) and not peft.saves(PROJECTION))


def _as_loaded(adapter: _Adapter) -> dict[str, Any] | None:
    return adapter.foreign.get("peft")


def _as_asked(adapter: _Adapter) -> dict[str, Any] | None:
    if adapter.section is None:
        return None
    try:
        return config_values(adapter.section) | _facts(adapter)
    except InputError:  # it speaks of layers or modules in a way that PEFT does not
        return None


def _outright(adapter: _Adapter) -> dict[str, Any]:
    """Every module by name, with numbers of its own where they are not the most common ones."""
    section, rslora = adapter.section, adapter.section is not None and adapter.section.rslora
    ranks = {s.module.name: s.rank for s in adapter.sites}
    if section is not None:
        ranks = _asked_ranks(adapter, section, ranks)
    alphas = {s.module.name: alpha_of(s.scale, ranks[s.module.name], rslora=rslora) for s in adapter.sites}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    parameters = [s.module.name for s in adapter.sites if s.module.parameter]
    # PEFT looks for parameters among all of them.
    everything = adapter.names.parameters.keys() | adapter.names.modules.keys()
    return DEFAULTS | (adapter.foreign.get("peft") or {}) | {
        "r": rank,
        "lora_alpha": plain(alpha),
        "use_rslora": rslora,
        "target_modules": _shortest([n for n in ranks if n not in parameters], adapter.names.modules.keys()),
        "target_parameters": _shortest(parameters, everything) or None,
        "lora_dropout": 0.0 if parameters or section is None else section.dropout,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): plain(a) for n, a in alphas.items() if a != alpha},
    } | _facts(adapter)  # fmt: skip


def _asked_ranks(adapter: _Adapter, config: LoraSection, least: dict[str, int]) -> dict[str, int]:
    """The ranks that the config asked for where they fit: trained numbers may happen to be 0."""
    found, patterns = {}, Patterns("adapter.rank_pattern")
    for site in adapter.sites:
        names = (*site.module.site.names[site.module.layer], site.module.name)
        pattern = next((p for p in config.rank_pattern for n in names if patterns.match(rf"(.*\.)?({p})", n)), None)
        asked = config.rank if pattern is None else config.rank_pattern[pattern]
        name = site.module.name
        found[name] = asked if least[name] <= asked <= site.a.shape[-1] else least[name]
    return found


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


def _facts(adapter: _Adapter) -> dict[str, Any]:
    """What is trained beside LoRA, and what kind of model it is for."""
    biases = adapter.trained.get("bias", [])
    untrained = [p for p in adapter.trained.get("frozen", []) if p.name.endswith(".bias")]
    section = adapter.section
    bias = "none" if not biases else section.bias if section and section.bias != "none" else "lora_only" if untrained else "all"
    return {
        "task_type": adapter.foreign.get("peft", {}).get("task_type") or (adapter.kind and adapter.kind.task_type),
        "bias": bias,
        "modules_to_save": _saved_names(adapter) or None,
    }


def _saved_names(adapter: _Adapter) -> list[str]:
    head = list(adapter.kind.head_modules) if adapter.kind else []
    names = {name for p in adapter.saved if not set(head) & set((name := p.name.rpartition(".")[0]).split("."))}
    if _shares_saved_embedding(adapter):
        names.add(PROJECTION)
    return (head if adapter.trained.get("head") else []) + sorted(names)


def _shares_saved_embedding(adapter: _Adapter) -> bool:
    """Whether the vocabulary projection shares a trained embedding's weights. To PEFT they are two modules, each with its own copy."""
    decoder = adapter.decoder
    return decoder is not None and decoder.config.tied and any(p.variable is decoder.embed.embedding for p in adapter.saved)


def _source(adapter: _Adapter) -> dict[str, Any]:
    """Where the base came from, as PEFT says it."""
    base: Any = next((m for _, m in nnx.iter_modules(adapter.model) if getattr(m, "origin", None) is not None), None)
    if base is None:
        return {"base_model_name_or_path": None}
    source = base.origin.source
    revision = source.partition("@")[2] if source.startswith("hf://") else ""
    return {"base_model_name_or_path": public_name(source)} | ({"revision": revision} if revision else {})


# The tensors


def _tensors(adapter: _Adapter, config: PeftConfig, ranks: dict[str, int]) -> dict[str, Tensor]:
    found = {}
    adapted = {s.module.name for s in adapter.sites}
    for site in adapter.sites:
        rank = ranks[site.module.name]
        arrays = to_file(site.a[..., :rank], site.b[..., :rank, :])
        found |= {key: _float32(array) for key, array in zip(factor_keys(site.module, adapted), arrays, strict=True)}
    saved = {p.name for p in adapter.saved}
    for parameter in adapter.names.parameters.values():
        module, _, kind = parameter.name.rpartition(".")
        inner = f"{ROOT}{module}.base_layer.{kind}" if module in adapted else ROOT + parameter.name
        trained_bias = kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in adapted))
        if parameter.name in saved:
            found[ROOT + parameter.name] = _float32(parameter.read())
        elif trained_bias or inner in adapter.foreign.get("copies", ()):
            found[inner] = _float32(parameter.read())
    if _shares_saved_embedding(adapter):
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


class PeftExporter(Exporter):
    """An adapter in PEFT's format."""

    summary = "The adapter alone, float32, for PEFT."

    def can(self, restored: Restored) -> str | None:
        """Why PEFT has no file for what was trained; None where it has."""
        modules = site_modules(restored.model).values()
        if modules and all(m.method.low_rank(m) is not None for m in modules):
            return None
        return f"trained '{restored.member.config.adapter.method}', which PEFT's LoRA cannot hold."

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Config, tensors and a model card."""
        adapter, source = _Adapter(restored.model), restored.member.config.model.source
        _write(adapter, folder, None)
        auto = adapter.kind.auto_class if adapter.kind else "AutoModel"
        base = public_name(source) if source.startswith("hf://") else "PATH OF THE BASE"
        labels = f", num_labels={len(restored.classes)}" if restored.classes and adapter.kind and adapter.kind.head_modules else ""
        usage = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(base)}{labels})",
            'model = PeftModel.from_pretrained(base, "PATH")',
        ]
        summary = "A low-rank adapter for `{base}`, in PEFT's format."
        write_card(folder, model_card(restored, library="peft", relation="adapter", summary=summary, usage=usage))


EXPORTERS.register("peft", PeftExporter())
