"""Members that failed: recorded with the reason while the others go on, and tried again by name."""

from __future__ import annotations

import fnmatch
import traceback
from collections.abc import Sequence

from ..errors import InputError, hint
from ..packing.pack import Member
from ..packing.runner import Pieces
from ..parallel.processes import is_writer
from ..tracking import MemberResult, Progress, RunDirectory, write_atomic

_AGAIN = ("failed", "diverged")


def record_failure(run: RunDirectory, members: Sequence[Member], error: Exception, progress: Progress) -> None:
    """Records members as failed, with the reason in `results.json` and where it happened in `error.txt`, those that ended before not."""
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    told = "".join(traceback.format_exception(error))
    failed = [m for m in members if m.name not in run.statuses]
    for member in failed if is_writer() else []:
        folder = run.member(member.name)
        write_atomic(folder / "error.txt", told)
        MemberResult(member.name, member.settings, parameters=0, status="failed", final={}, error=reason).write(folder)
    run.refresh()
    progress.print(f"failed: {', '.join(m.name for m in failed)}: {reason}")


def told_failures(results: Sequence[MemberResult]) -> str | None:
    """What to say of the members that failed; None where none did."""
    failed = [r for r in results if r.status == "failed"]
    if not failed:
        return None
    lines = [f"  {r.name}: {r.error}" for r in failed[:6]] + ([f"  ... and {len(failed) - 6} more"] if len(failed) > 6 else [])
    count = f"{len(failed)} member{'s' * (len(failed) > 1)} failed (each folder's error.txt says where):"
    return "\n".join([count, *lines, f"The same command with --retry NAME tries one again: --retry '{failed[0].name}', or --retry '*'."])


def reopen(run: RunDirectory, members: Sequence[Member], wanted: Sequence[str]) -> None:
    """Makes members that failed or diverged ones that have yet to end; what each came to is kept beside, as `results-retried-1.json`.

    One that failed goes on from its pack's last checkpoint, one that diverged begins anew.

    Args:
        run: open for writing.
        members: of the whole sweep.
        wanted: names, or patterns such as `rank=8,*` or `*`.

    Raises:
        InputError: a name or pattern fits no member, or none that failed or diverged.
    """
    status: dict[str, str] = {}
    known = [m.name for m in members]
    for pattern in wanted:
        fitting = [n for n in known if n == pattern] or [n for n in known if fnmatch.fnmatchcase(n, pattern)]
        again = {n: run.statuses[n] for n in fitting if run.statuses.get(n) in _AGAIN}
        if not fitting:
            raise InputError(f"--retry: no member '{pattern}'. {hint(pattern, known)}")
        if not again:
            one = f"'{pattern}' is {run.statuses.get(pattern, 'yet to be trained')}" if pattern in known else f"none of '{pattern}' is so"
            raise InputError(f"--retry: is for members that failed or diverged; {one}.")
        status |= again
    pieces = Pieces(run, members)
    for pack in run.started_packs():
        diverged = [n for n in pack if status.get(n) == "diverged"]
        failed = [n for n in pack if status.get(n) == "failed"]
        if diverged:  # the pack has ended, and its checkpoint holds what is not finite any more
            folder = run.checkpoints(pack)
            folder.rename(next(p for i in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.retried-{i}")).exists()))
        elif failed and failed != pack and not pieces.is_cut(pack):
            pieces.record(pack, [failed], "tried again")
    for name in status:
        file = run.member(name) / "results.json"
        file.rename(next(p for i in range(1, 1000) if not (p := file.with_name(f"results-retried-{i}.json")).exists()))
    run.refresh()
