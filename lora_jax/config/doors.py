"""The seven doors: what the library grows by has one file each, and a registry that finds it.

A method, init, optimizer, task, family, base transform or exporter is registered under its name by the file that defines it. The
library's own files are imported from one folder when a name is first asked for; those of other packages through an entry point of the
door's group, or by calling `register` (`lora_jax.register_method` and its like).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ..errors import InputError, hint

T = TypeVar("T")


class Door(Generic[T]):
    """A registry of things by name.

    Args:
        what: what they are called in messages.
        folder: the package whose modules register the library's own.
        group: the entry points through which other packages add theirs; an entry point names a module or function that registers.
    """

    def __init__(self, what: str, folder: str, group: str):
        self.what, self._folder, self._group = what, folder, group
        self._found: dict[str, T] = {}
        self._loaded = False
        self._changed: list[Callable[[], object]] = []

    def register(self, name: str, thing: T) -> T:
        """Adds a thing under a name, and returns it.

        Raises:
            ValueError: another thing has this name.
        """
        if self._found.setdefault(name, thing) is not thing:
            raise ValueError(f"there is a {self.what} '{name}' already: {self._found[name]!r}")
        for told in self._changed:
            told()
        return thing

    def get(self, name: object, key: str) -> T:
        """The thing of this name.

        Args:
            name: as it was given.
            key: the config key or option it came from, for the message.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        if not isinstance(name, str) or name not in self.all():
            raise InputError(f"{key}: there is no {self.what} '{name}'. {hint(str(name), self.all())}".rstrip())
        return self._found[name]

    def all(self) -> dict[str, T]:
        """Name -> thing, the library's own first, in the order of their files."""
        if not self._loaded:
            self._loaded = True
            for module in sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(self._folder).__path__)):
                importlib.import_module(f"{self._folder}.{module}")
            for point in importlib.metadata.entry_points(group=self._group):
                found = point.load()
                if callable(found):
                    found()
        return self._found

    def on_change(self, told: Callable[[], object]) -> None:
        """Calls `told` whenever something is registered from here on."""
        self._changed.append(told)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())


# Each is filled from the folder that defines what it holds: a method's section comes with the method.
METHODS: Door[Any] = Door("method", "lora_jax.adapters.methods", "lora_jax.methods")
INITS: Door[Any] = Door("init", "lora_jax.adapters.inits", "lora_jax.inits")
OPTIMIZERS: Door[Any] = Door("optimizer", "lora_jax.training.optimizers", "lora_jax.optimizers")
TASKS: Door[Any] = Door("task", "lora_jax.tasks", "lora_jax.tasks")
FAMILIES: Door[Any] = Door("family", "lora_jax.models.families", "lora_jax.families")
TRANSFORMS: Door[Any] = Door("base transform", "lora_jax.models.transforms", "lora_jax.transforms")
EXPORTERS: Door[Any] = Door("exporter", "lora_jax.interop", "lora_jax.exporters")

register_method = METHODS.register
register_init = INITS.register
register_optimizer = OPTIMIZERS.register
register_task = TASKS.register
register_family = FAMILIES.register
register_transform = TRANSFORMS.register
register_exporter = EXPORTERS.register


class OneOf:
    """Says of a config field that its section is that of a door's thing (its attribute `section`), told apart by one key.

    Args:
        door: the registry.
        key: the section's key that names the thing.
        default: what is meant where the key is left out; None: it is needed.
    """

    def __init__(self, door: Door[Any], key: str, default: str | None = None):
        self.door, self.key, self.default = door, key, default

    def sections(self) -> dict[str, type[BaseModel]]:
        """Name -> section class."""
        return {name: thing.section for name, thing in self.door.all().items()}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(section) for name, section in self.sections().items()}
        if not choices:  # pydantic has no union of nothing
            return core_schema.no_info_plain_validator_function(self._none)
        return core_schema.no_info_before_validator_function(
            self._without_defaults_of_others, core_schema.tagged_union_schema(choices, discriminator=self._tag)
        )

    def defaults_of_others(self, value: Any) -> list[str]:
        """The keys of a section that its kind does not have and that hold the default of another kind's."""
        sections = self.sections()
        tag = self._tag(value)
        own = sections.get(tag) if isinstance(value, dict) and isinstance(tag, str) else None
        if own is None:
            return []

        def says_nothing(key: str, held: Any) -> bool:
            others = [section.model_fields[key] for section in sections.values() if key in section.model_fields]
            return any(held is None if field.is_required() else held == field.get_default(call_default_factory=True) for field in others)

        return [key for key, held in value.items() if key not in own.model_fields and says_nothing(key, held)]

    def _without_defaults_of_others(self, value: Any) -> Any:
        """The section without them: run directories of older versions say the keys of every kind. `load_config` says so of a person's."""
        return {key: held for key, held in value.items() if key not in found} if (found := self.defaults_of_others(value)) else value

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) if self.sections() else {"type": "object"}

    def _none(self, value: Any) -> Any:
        raise PydanticCustomError("union_tag_invalid", "nothing is registered")

    def wrong(self, error: Mapping[str, Any], below: Sequence[str | int]) -> str:
        """The sentence for what pydantic found wrong in a section that stands in a list.

        Args:
            error: one of `ValidationError.errors()`.
            below: the rest of its path: the section's kind and key, as far as it got.
        """
        value, kind, key = error["input"], str(below[0]) if below else "", ".".join(map(str, below[1:]))
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            if not isinstance(value, dict) or self.key not in value:
                return f"must be a section such as {{{self.key}: ...}}, got {value!r}. {hint('', self.door)}".rstrip()
            return f"there is no {self.door.what} '{value[self.key]}'. {hint(str(value[self.key]), self.door)}".rstrip()
        if error["type"] == "extra_forbidden":
            return f"'{kind}' has no key '{key}'. {hint(key, self.door.all()[kind].section.model_fields)}".rstrip()
        said = error["ctx"]["error"] if error["type"] == "value_error" else f"{error['msg'][0].lower()}{error['msg'][1:]}"
        return f"{kind}: {key + ': ' if key else ''}{said}" + ("." if error["type"] in ("missing", "value_error") else f", got {value!r}.")

    def _tag(self, value: Any) -> Any:
        return value.get(self.key, self.default) if isinstance(value, dict) else getattr(value, self.key, None)


class Named:
    """Says of a config field that it holds a section of a door's thing, or the thing's name alone: `pissa`, `{kind: pissa, ...}`.

    Read, it is the section; written, the name where nothing else is said. The door is asked when a value is read, not before.

    Args:
        door: the registry; the key that names the thing is `kind`.
    """

    def __init__(self, door: Door[Any]):
        self.door = door

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self._written)
        return core_schema.no_info_plain_validator_function(self._read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(self.door)}, {"type": "object"}]}

    def _read(self, value: Any) -> BaseModel:
        if isinstance(value, BaseModel):
            value = value.model_dump()
        kind = value.get("kind") if isinstance(value, Mapping) else value
        if not isinstance(kind, str) or kind not in self.door.all():
            what = f"has no key 'kind': {value!r}" if kind is None else f"there is no {self.door.what} {kind!r}"
            raise PydanticCustomError("value_error", "{error}", {"error": f"{what}. {hint(str(kind), self.door)}".rstrip(". ")})
        section: type[BaseModel] = self.door.all()[kind].section
        try:
            return section.model_validate({"kind": kind} if isinstance(value, str) else value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                said = f"'{kind}' has no key '{key}'. {hint(key, section.model_fields)}".rstrip(". ")
            else:
                said = f"'{kind}': {key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
            raise PydanticCustomError("value_error", "{error}", {"error": said}) from None

    @staticmethod
    def _written(section: BaseModel) -> Any:
        values = section.model_dump(exclude_defaults=True)
        kind = section.kind  # pyright: ignore[reportAttributeAccessIssue]
        return {"kind": kind} | values if values.keys() - {"kind"} else kind


# Where the config holds a list of sections: path -> of what.
SECTION_LISTS: dict[tuple[str | int, ...], OneOf] = {("model", "transforms"): OneOf(TRANSFORMS, "kind")}
