"""`Exporter`: a format that a trained member is written in.

An exporter is registered with `register_exporter(name, exporter)`; `lora-jax export --format NAME` then writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..config.doors import register_exporter as register_exporter
from ..errors import InputError, hint
from ..sweeps.restore import Restored


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export; None leaves the choice to the exporter.

    Attributes:
        dtype: of the written weights.
        max_shard_size: bytes of weights in one file.
    """

    dtype: str | None = None
    max_shard_size: int | None = None

    def given(self) -> dict[str, str | int]:
        """Name -> value of the options that are set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Exporter:
    """A format, one instance each.

    Attributes:
        summary: one line for `lora-jax export --help`.
        default: whether `lora-jax export` takes it where no format is named.
        options: fields of `ExportOptions` that it reads -> their values; an empty tuple allows any.
    """

    summary: ClassVar[str] = ""
    default: ClassVar[bool] = False
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def can(self, restored: Restored) -> str | None:
        """Why this member cannot be written in this format; None where it can."""
        return None

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Writes the member's files into `folder`, which exists and is empty. On an error the caller removes it."""
        raise NotImplementedError


def option_flag(name: str) -> str:
    """The command line's flag of an option.

    >>> option_flag("max_shard_size")
    '--max-shard-size'
    """
    return "--" + name.replace("_", "-")


def check_options(exporter: Exporter, form: str, options: ExportOptions) -> None:
    """Checks that an exporter reads every option that is set.

    Raises:
        InputError: it has no such option, or the option no such value.
    """
    for name, value in options.given().items():
        if name not in exporter.options:
            known = ", ".join(option_flag(o) for o in exporter.options) or "none"
            raise InputError(f"{option_flag(name)}: --format {form} has no such option. Its options: {known}.")
        if (choices := exporter.options[name]) and value not in choices:
            raise InputError(f"{option_flag(name)}: '{value}'. {hint(str(value), choices)}".rstrip())
