"""`lora-jax export`: a run's winner in the form that others read."""

from __future__ import annotations

from pathlib import Path

from ..config.types import size_text, to_bytes
from ..errors import InputError
from .console import results_console


def export_command(run: Path, *, form: str, out: Path | None, member: str | None, dtype: str | None, largest: str) -> None:
    """Writes a member of a run as a Hugging Face checkpoint or a PEFT adapter, and says where."""
    from ..interop.export import export_run

    try:
        limit = to_bytes(largest)
    except ValueError as error:
        raise InputError(f"--max-shard-size: {error}.") from None
    done = export_run(run, form=form, out=out, member=member, dtype=dtype, largest=limit)
    console = results_console()
    why = f" ({done.reason})" if done.reason else ""
    console.print(f"{done.member}{why}, the {done.adapter} adapter: {done.folder}", markup=False, highlight=False, soft_wrap=True)
    for file in sorted(done.folder.iterdir()):
        console.print(f"  {file.name}  {size_text(file.stat().st_size)}", markup=False, highlight=False, soft_wrap=True)
