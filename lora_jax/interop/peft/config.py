"""PEFT's `adapter_config.json` (PEFT 0.21), read into typed values. No option is passed over in silence.

An option is one of three things: part of what the adapter computes, a note that changes nothing (kept, so that it is there when the
adapter is saved again), or something that is not supported, which must be off. Which are which the method says (`Method.peft`). Matching
follows PEFT to the letter (`check_target_module_exists`, `get_pattern_key`): names are Hugging Face's own, from the model's root.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...adapters.methods.base import Method
from ...adapters.methods.peft_form import GENERAL, PLACES, PeftForm, Reader
from ...adapters.sites import Site
from ...adapters.targets import KINDS, PRESETS
from ...config.doors import METHODS
from ...config.schema import AdapterConfig
from ...errors import InputError, hint
from ...weights.checkpoint import read_json
from ...weights.load import resolve

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a hub repository is asked for.
HUB_FILES = ["adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json"]

# Words that our targets have besides the names of modules.
WORDS = (*PRESETS, *KINDS)


def form_of(method: Method) -> PeftForm:
    """How PEFT holds a method.

    Raises:
        InputError: it does not.
    """
    if method.peft is None:
        raise InputError(f"adapter.method: PEFT has no type that could hold '{method.name}'.")
    return method.peft


def method_of_type(raw: dict[str, Any], where: str) -> Method:
    """The method whose files a PEFT config is of: that of its type whose flags it has, of several the one with most flags.

    Where several have one form, it is the one whose form it is: they are registered after it.

    Raises:
        InputError: there is none.
    """
    kind, forms = raw.get("peft_type"), [(m.peft, m) for m in METHODS.all().values() if m.peft is not None]
    same: list[tuple[PeftForm, Method]] = [(form, method) for form, method in forms if form.peft_type == kind]
    if not same:
        types = sorted({form.peft_type for form, _ in forms})
        raise InputError(f"{where}: peft_type is {kind!r}; adapters of these types can be loaded: {', '.join(types)}.")
    found = [(form, m) for form, m in same if all(raw.get(o, form.defaults.get(o)) == value for o, value in form.flags.items())]
    if not found:
        flags = " or ".join(sorted(str(dict(form.flags)) for form, _ in same))
        raise InputError(f"{where}: adapters of type '{kind}' can be loaded with {flags}, and this one has other values.")
    return max(found, key=lambda one: len(one[0].flags))[1]


def check_options(form: PeftForm, read: Reader) -> None:
    """`InputError` where a config asks for what is not supported or not known."""
    known = GENERAL.keys() | form.defaults.keys() | form.notes | form.unsupported.keys() | {"peft_type"}
    for key, value in read.raw.items():
        if key in known and key not in form.unsupported:
            continue
        default = form.defaults.get(key)
        if _off(value) and _off(default):  # files of older and newer PEFT name options that we need not know
            continue
        if key not in form.unsupported:
            raise InputError(f"{read.where}: the option '{key}' is not known. {hint(key, known)}".rstrip())
        if type(value) is not type(default) or value != default:
            raise InputError(f"{read.where}: '{key}' is set: {form.unsupported[key]}.")
    form.check(read)


def _off(value: Any) -> bool:
    return value is None or value is False or value in ([], {})


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an adapter computes, as PEFT's config says it.

    Attributes:
        raw: the JSON object, notes and all.
        method: the method that the file is of.
        section: the adapter section that asks for the same.
        targets, exclude: names that end a module's path, or a regular expression for the whole of it.
        parameters: 3-D parameters (expert stacks), by the end of their path.
        layers, layers_pattern: the layers that `targets` (a list) is limited to, and what the list of layers may be called.
        saved: modules whose own weights are in the file.
        read: matches its patterns.
    """

    raw: dict[str, Any]
    method: Method
    section: AdapterConfig
    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] | None
    parameters: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    read: Reader = dataclasses.field(repr=False, compare=False)

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str) -> PeftConfig:
        """Reads the JSON object of `adapter_config.json`.

        Args:
            raw: the object.
            where: the file, for messages.

        Raises:
            InputError: the type, an option, or the value of an option is unknown, unsupported, or of a wrong type.
        """
        method = method_of_type(raw, where)
        form, read = form_of(method), Reader(raw, where)
        check_options(form, read)
        pattern = raw.get("layers_pattern")
        patterns = (pattern,) if isinstance(pattern, str) and pattern else read.names("layers_pattern") or ()
        for one in patterns:
            read.expressions.check("layers_pattern", one)
        targets = read.modules("target_modules")
        parameters = read.names("target_parameters") or ()
        if not targets and not parameters:
            raise InputError(f"{where}: 'target_modules' names nothing.")
        layers = read.layers("layers_to_transform")
        if isinstance(targets, str) and (layers is not None or patterns):
            raise InputError(f"{where}: 'layers_to_transform' goes with a list of target_modules, not with a regular expression.")
        saved = read.names("modules_to_save") or ()
        for name in saved:
            read.expressions.check("modules_to_save", name)  # PEFT matches it as one when it looks for targets
        exclude = read.modules("exclude_modules")
        bias = read.choice("bias", "none", ("none", "all", form.only))
        values = form.values(read) | _places(targets, exclude, parameters, layers, patterns)
        values |= {"bias": "lora_only" if bias == form.only else bias, "modules_to_save": list(saved)}
        try:
            section = method.section(**values)
        except ValidationError as error:
            raise _wrong(error, form, where) from None
        return cls(raw, method, section, targets, exclude, parameters, layers, patterns, saved, read)

    @property
    def form(self) -> PeftForm:
        """How PEFT holds the method."""
        return form_of(self.method)

    def adapts(self, module: str, *, linear: bool = True, parameter: bool = False) -> bool:
        """Whether a module, or a parameter, is adapted.

        Args:
            module: its path from the model's root.
            linear: whether it is a linear layer other than the output head: what `all-linear` means.
            parameter: whether it is a parameter.
        """
        if parameter:
            return any(module == p or module.endswith(f".{p}") for p in self.parameters)
        if self.read.named(self.exclude, module) or any(
            self.read.expressions.match(rf"(^|.*\.){name}($|\..*)", module, whole=False) for name in self.saved
        ):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return linear
            return self.read.expressions.match(self.targets, module) is not None
        if self.targets is None or not self.read.named(self.targets, module):
            return False
        # A module that is named in full is adapted whatever the layers.
        return self.layers is None or module in self.targets or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((m for p in patterns if (m := self.read.expressions.match(p, module, whole=False))), None)
        return None if found is None else int(found["idx"])

    def saves(self, module: str) -> bool:
        """Whether a module's own weights are in the file. PEFT asks how its path ends, dot or no dot: `norm` saves `input_layernorm`."""
        return any(module.endswith(name) for name in self.saved)

    def saves_part_of(self, module: str) -> bool:
        """Whether a module's weights are in the file, by its own name or as part of a module that is named."""
        parts = module.split(".")
        return any(self.saves(".".join(parts[:i])) for i in range(1, len(parts) + 1))

    def trains_bias(self, adapted: bool) -> bool:
        """Whether the bias of a module is in the file.

        Args:
            adapted: whether the module is adapted.
        """
        return self.section.bias == "all" or (self.section.bias == "lora_only" and adapted)

    def size(self, module: str, site: Site) -> tuple[int, dict[str, float]]:
        """Rank and settings of an adapted module, at its site."""
        rank = int(self._value(self.section.rank_pattern, module, self.section.rank))
        alpha = self._value(self.section.alpha_pattern, module, self.section.alpha)
        rank = self.form.rank_at(site, self.form.rank_of(self.section, module, rank, self.read), self.read)
        return rank, self.method.settings(self.section, rank, alpha) if rank else {}

    def placed(self, modules: dict[str, Site]) -> AdapterConfig:
        """The section for these adapted modules, PEFT's name -> site."""
        return self.form.placed(self.section, modules, self.read)

    def _value(self, patterns: dict[str, Any], module: str, default: float) -> float:
        matches = (v for p, v in patterns.items() if self.read.expressions.match(rf"(.*\.)?({p})$", module, whole=False))
        return next(matches, default)


def _wrong(error: ValidationError, form: PeftForm, where: str) -> InputError:
    """What a section's values have wrong, by PEFT's names of them."""
    found = []
    for one in error.errors(include_url=False):
        key = str(one["loc"][0]) if one["loc"] else ""
        found.append(f"'{form.words.get(key, key)}': {one['msg']}, not {str(one['input'])[:60]!r}")
    return InputError(f"{where}: {'; '.join(found)}.")


def _places(
    targets: str | tuple[str, ...] | None,
    exclude: str | tuple[str, ...] | None,
    parameters: tuple[str, ...],
    layers: tuple[int, ...] | None,
    patterns: tuple[str, ...],
) -> dict[str, Any]:
    """The keys of a section that say which modules are adapted."""
    found: Any = targets if isinstance(targets, str) else [*(targets or ()), *(p.removesuffix(".weight") for p in parameters)]
    limited: Any = None
    if isinstance(found, str):
        found = "all-linear" if found.lower() == "all-linear" else _as_regex(found)
    elif layers is not None and patterns:
        names, lists = ("|".join(n) for n in ([re.escape(t) for t in found], patterns))
        found = rf"(?:.*\.)?(?:{lists})\.(?:{'|'.join(map(str, layers))})\.(?:.*\.)?(?:{names})"
    elif layers is not None:
        limited = list(layers)
    return {
        "targets": found,
        "exclude": _as_regex(exclude) if isinstance(exclude, str) else list(exclude or ()) or None,
        "layers": limited,
    }


def _as_regex(text: str) -> str:
    """A regular expression that is not the name of a preset."""
    return f"(?:{text})" if text in WORDS else text


def config_values(method: Method, section: Any, raw: dict[str, Any] | None = None) -> dict[str, Any]:
    """PEFT's config of an adapter section, where it follows from the section alone.

    Args:
        method: whose section it is.
        section: the section.
        raw: the PEFT config that it was read from: returned as it is where it still says the same, and the source of the values that
            have no key here (`task_type`, `revision`, ...).

    Raises:
        InputError: it names layers or modules in a way that PEFT does not (`attention`, `last:4`), which takes the model; or PEFT has no
            option for what it says.
    """
    if raw is not None and PeftConfig.parse(raw, "the adapter's config").section.model_dump() == section.model_dump():
        return dict(raw)
    form = form_of(method)
    for key in ("targets", "exclude"):
        value = getattr(section, key)
        if value in WORDS and not (key == "targets" and value == "all-linear"):
            raise InputError(f"adapter.{key}: which modules '{value}' means depends on the model; give it: to_peft(model).")
    if isinstance(section.layers, str) or (section.layers is not None and isinstance(section.targets, str)):
        raise InputError(f"adapter.layers: which layers {section.layers!r} means depends on the model; give it: to_peft(model).")
    layers = [section.layers] if isinstance(section.layers, int) else section.layers
    if layers is not None and min(layers) < 0:
        raise InputError(f"adapter.layers: which layers {layers} means depends on the model; give it: to_peft(model).")
    places = {
        "target_modules": section.targets,
        "exclude_modules": section.exclude,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "bias": form.only if section.bias == "lora_only" else section.bias,
        "modules_to_save": section.modules_to_save or None,
    }
    return new_config(form) | (raw or {}) | form.fields(section) | said_places(form, places)


def said_places(form: PeftForm, places: dict[str, Any]) -> dict[str, Any]:
    """Of the options that say where an adapter is, those that the type has.

    Raises:
        InputError: another one is on.
    """
    for key, value in places.items():
        if key not in form.defaults and value not in (None, "none", []):
            raise InputError(f"PEFT's type {form.peft_type} has no '{key}', and the adapter takes one: {str(value)[:60]}.")
    return {key: value for key, value in places.items() if key in form.defaults}


def new_config(form: PeftForm) -> dict[str, Any]:
    """The values of a new file for options that nothing here sets: PEFT's defaults."""
    return dict(sorted((GENERAL | dict(form.defaults) | {"peft_type": form.peft_type}).items()))


def untold(form: PeftForm) -> set[str]:
    """Options of the type of which its form does not say what they are to us, or says two things."""
    told = [*form.words.values(), *form.flags, *form.own, *form.notes, *form.unsupported, *PLACES]
    return {key for key in form.defaults if told.count(key) != 1}


def adapter_folder(path: str | Path) -> Path:
    """The local folder of an adapter: a folder, the config in it, or `hf://org/name`.

    Raises:
        InputError: there is no such place.
    """
    found = resolve(str(path), key="adapter", hub_patterns=HUB_FILES)
    return found.parent if found.is_file() else found


def read_peft_config(path: str | Path) -> PeftConfig:
    """The config of the adapter at `path`.

    Raises:
        InputError: there is none, it is damaged, or it asks for what is not supported.
    """
    file = adapter_folder(path) / CONFIG_NAME
    return PeftConfig.parse(read_json(file, "the adapter's config"), str(file))


def option_digests(form: PeftForm, raw: Mapping[str, Any]) -> dict[str, str]:
    """Option -> digest of its value, of those that decide what an adapter computes."""
    computed = form.defaults.keys() - form.notes
    return {key: hashlib.sha256(json.dumps(raw[key], sort_keys=True).encode()).hexdigest()[:16] for key in sorted(computed & raw.keys())}


def check_digests(config: PeftConfig, digests: Mapping[str, str], where: str) -> None:
    """`InputError` where an option is not as it was when the tensors beside it were written.

    Args:
        config: as it is read now.
        digests: those that were kept with the tensors (`option_digests`); none of an adapter that others wrote.
        where: the file, for messages.
    """
    now = option_digests(config.form, config.raw)
    changed = [key for key in sorted(now.keys() | digests.keys()) if digests and now.get(key) != digests.get(key)]
    if changed:
        raise InputError(
            f"{where}: {', '.join(map(repr, changed))} is not as it was when {WEIGHTS_NAME} was written: damaged, or edited. If the change "
            "is meant, write the tensors anew, without digests: safetensors.numpy.save_file(safetensors.numpy.load_file(file), file)."
        )


def to_json(raw: dict[str, Any]) -> str:
    """The text of `adapter_config.json`, as PEFT writes it."""
    return json.dumps(raw, indent=2, sort_keys=True)
