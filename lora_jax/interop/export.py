"""`export_run`: a trained member of a run, written in the format of an exporter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..analysis.best import choose_member
from ..config.doors import EXPORTERS
from ..errors import InputError
from ..sweeps.restore import restore_member
from ..tracking import member_folder
from ..tracking.files import check_new, new_folder
from .base import Exporter, ExportOptions, check_options, option_flag


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        member: name of the member.
        adapter: which of its adapters: `best` or `final`.
        reason: why this member, where it was not named; else empty.
    """

    folder: Path
    member: str
    adapter: str
    reason: str


def export_run(
    path: Path, *, form: str | None = None, out: Path | None = None, member: str | None = None, options: ExportOptions | None = None
) -> Export:
    """Writes a member of a run. The folder appears whole or not at all.

    Args:
        path: a run directory, or a member's folder in it.
        form: name of the exporter; the default one where it is None.
        out: a folder that does not exist yet; `FORM` in the member's folder by default.
        member: its name; by default the run's best finished one.
        options: of the exporter.

    Raises:
        InputError: no such exporter, run, member or adapter; the exporter cannot write this member, or has no such option; or something
            is at `out`.
        RunError: the folder cannot be written.
    """
    form = form or next(name for name, exporter in EXPORTERS.all().items() if exporter.default)
    exporter: Exporter = EXPORTERS.get(form, "--format")
    options = options or ExportOptions()
    check_options(exporter, form, options)
    run, chosen, reason = choose_member(path, member)
    folder = run / member_folder(chosen.name) / form if out is None else out
    check_new(folder, "--out: ")
    restored = restore_member(run, chosen)
    if (why := exporter.can(restored)) is not None:
        others = [name for name, other in EXPORTERS.all().items() if other is not exporter and other.can(restored) is None]
        raise InputError(f"--format {form}: member '{chosen.name}': {why}" + (f" Formats that can: {', '.join(others)}." if others else ""))
    with new_folder(folder) as part:
        exporter.write(restored, part, options)
    return Export(folder, chosen.name, restored.folder.name, reason)


def format_list() -> list[tuple[str, str]]:
    """(name, summary and options) of every exporter, for `--help`."""
    found = []
    for name, exporter in EXPORTERS.all().items():
        options = [option_flag(o) + (f" ({', '.join(choices)})" if choices else "") for o, choices in exporter.options.items()]
        found.append(
            (name + (" (default)" if exporter.default else ""), exporter.summary + (f" Options: {', '.join(options)}." if options else ""))
        )
    return found
