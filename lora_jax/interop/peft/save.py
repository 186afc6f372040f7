"""`save_peft`: an adapted model to the two files of a PEFT adapter.

The config that is written is the one the adapter came with, where it says of every module what the model computes; else one that
names modules, ranks and alphas outright.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ...adapters.inject import LABEL, Record, inject, recall
from ...adapters.members import site_modules
from ...adapters.merge import strip
from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.decoder import Decoder
from ...models.encoder import Encoder
from ...models.heads import Classifier
from ...tracking.files import new_folder
from ...weights.safetensors import Tensor, write_safetensors
from .config import CONFIG_NAME, DEFAULTS, WEIGHTS_NAME, LoraConfig, PeftConfig, plain, to_json
from .load import saved_with
from .names import PROJECTION, ROOT, Module, Parameter, PeftNames, Renaming, factor_keys, head_kind, to_file


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
    """An adapted model as PEFT sees it: its modules with LoRA, and the weights of the base that were trained."""

    def __init__(self, model: nnx.Module):
        self.model = model
        self.record: Record | None = recall(model)
        self.foreign: dict[str, Any] = json.loads(self.record.foreign) if self.record and self.record.foreign else {}
        base = strip(model)
        renaming = Renaming(*self.foreign["renaming"]) if self.foreign else None
        self.names = PeftNames(base, renaming=renaming)
        self.sites = _sites(model, self.names)
        if not self.sites:
            raise InputError("the model bears no LoRA: there is nothing that PEFT could hold.")
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

    Padded ranks are trimmed. An adapter from `load_peft` keeps its config and the bits of its tensors.

    Args:
        model: an adapted model from `inject`, `load_peft` or `training`.
        path: a folder that does not exist yet, or is empty.
        base: the base's name in the config (`base_model_name_or_path`). Default: its name in the loaded adapter's config, or the
            source the base was loaded from.
        card: text of a `README.md`.

    Raises:
        InputError: the model has no LoRA adapter, or `path` is not empty.
    """
    adapter = _Adapter(model)
    config, ranks = _config(adapter)
    if base is not None:
        config = config | {"base_model_name_or_path": base}
    elif config.get("base_model_name_or_path") is None:
        config = config | _source(adapter)
    with new_folder(Path(path)) as folder:
        (folder / CONFIG_NAME).write_text(to_json(config), encoding="utf-8")
        tensors = _tensors(adapter, PeftConfig.parse(config, CONFIG_NAME), ranks)
        write_safetensors(folder / WEIGHTS_NAME, dict(sorted(tensors.items())))
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


def config_for_base(model: nnx.Module, config: AdapterConfig) -> dict[str, Any]:
    """PEFT's config of an adapter config on a base, as `save_peft` writes it."""
    return _config(_Adapter(inject(model, config, rngs=nnx.Rngs(0))))[0]


def _sites(model: nnx.Module, names: PeftNames) -> list[_Site]:
    by_place = {(m.site.name, m.layer): m for m in names.modules.values()}
    found = []
    for name, module in site_modules(model).items():
        a, b, scale = (np.asarray(jax.device_get(v[...])) for v in (module.lora_a, module.lora_b, module.scale))
        if scale.ndim == 0:
            a, b, scale = a[None], b[None], scale[None]
        depth = len(by_place[name, 0].site.names)
        for i in range(len(a)):
            if scale[i] != 0:
                used = np.abs(a[i]).reshape(-1, a.shape[-1]).sum(0) + np.abs(b[i]).sum(-1).reshape(-1, b.shape[-2]).sum(0) > 0
                rank = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 1
                found.append(_Site(by_place[name, depth - len(a) + i], a[i], b[i], scale[i], rank))
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
    if any(saved_with(peft, n.rpartition(".")[0]) != (n in saved) for n in adapter.names.parameters):
        return False
    return not (_shares_saved_embedding(adapter) and not peft.saves(PROJECTION))


def _as_loaded(adapter: _Adapter) -> dict[str, Any] | None:
    return adapter.foreign.get("peft")


def _as_asked(adapter: _Adapter) -> dict[str, Any] | None:
    if adapter.record is None:
        return None
    config = LoraConfig.model_validate_json(adapter.record.config)
    try:
        return config.to_peft() | _facts(adapter)
    except InputError:  # it speaks of layers or modules in a way that PEFT does not
        return None


def _outright(adapter: _Adapter) -> dict[str, Any]:
    """Every module by name, with numbers of its own where they are not the most common ones."""
    rslora = adapter.record is not None and AdapterConfig.model_validate_json(adapter.record.config).rslora
    ranks = {s.module.name: s.rank for s in adapter.sites}
    if adapter.record is not None:
        ranks = _asked_ranks(adapter, ranks)
    alphas = {s.module.name: _alpha(s.scale, ranks[s.module.name], rslora=rslora) for s in adapter.sites}
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
        "lora_dropout": 0.0 if parameters or adapter.record is None else AdapterConfig.model_validate_json(adapter.record.config).dropout,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): plain(a) for n, a in alphas.items() if a != alpha},
    } | _facts(adapter)  # fmt: skip


def _asked_ranks(adapter: _Adapter, least: dict[str, int]) -> dict[str, int]:
    """The ranks that the config asked for where they fit: trained numbers may happen to be 0."""
    assert adapter.record is not None
    config = AdapterConfig.model_validate_json(adapter.record.config)
    found = {}
    for site in adapter.sites:
        names = (*site.module.site.names[site.module.layer], site.module.name)
        pattern = next((p for p in config.rank_pattern for n in names if re.fullmatch(rf"(.*\.)?({p})", n)), None)
        asked = config.rank if pattern is None else config.rank_pattern[pattern]
        name = site.module.name
        found[name] = asked if least[name] <= asked <= site.a.shape[-1] else least[name]
    return found


def _alpha(scale: np.float32, rank: int, *, rslora: bool) -> float:
    """The shortest number that gives this scale, bit for bit: 16 rather than 15.999999."""
    root = math.sqrt(rank) if rslora else rank
    exact = float(scale) * root
    rounded: Iterable[float] = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((a for a in rounded if np.float32(a / root) == scale), exact)


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


_TASKS = {"classification": "SEQ_CLS", "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS"}
# What PEFT saves of its own accord with a task, whatever of it there is.
_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def _facts(adapter: _Adapter) -> dict[str, Any]:
    """What is trained beside LoRA, and what kind of model it is for."""
    biases = adapter.trained.get("bias", [])
    untrained = [p for p in adapter.trained.get("frozen", []) if p.name.endswith(".bias")]
    record = adapter.record and AdapterConfig.model_validate_json(adapter.record.config)
    bias = "none" if not biases else record.bias if record and record.bias != "none" else "lora_only" if untrained else "all"
    return {
        "task_type": adapter.foreign.get("peft", {}).get("task_type") or _task(adapter),
        "bias": bias,
        "modules_to_save": _saved_names(adapter) or None,
    }


def _task(adapter: _Adapter) -> str | None:
    classifier = next((m for _, m in nnx.iter_modules(adapter.model) if isinstance(m, Classifier)), None)
    if classifier is not None:
        return _TASKS.get(head_kind(classifier) or "")
    if adapter.decoder is not None:
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if any(isinstance(m, Encoder) for _, m in nnx.iter_modules(adapter.model)) else None


def _saved_names(adapter: _Adapter) -> list[str]:
    head = _HEADS.get(_task(adapter) or "", [])
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
    name, _, revision = base.origin.source.removeprefix("hf://").partition("@" if base.origin.source.startswith("hf://") else "\0")
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})


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
