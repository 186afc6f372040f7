"""`export_run`: a run's winner, taken away as a Hugging Face checkpoint or a PEFT adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..analysis.metrics import primary_metric
from ..errors import InputError, hint
from ..models.heads import Classifier
from ..packing.pack import Member
from ..sweeps.restore import adapter_folder_of, named_member, restore_member, run_members
from ..tracking import MemberResult, member_folder, read_json, read_run
from ..tracking.files import check_new
from .card import model_card
from .hf import SHARD, WRITTEN_DTYPES, check_form, save_pretrained
from .peft.names import head_kind
from .peft.save import save_peft

FORMATS = ("hf", "peft")


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        member: of which member.
        adapter: which of its adapters: `best` or `final`.
        reason: why this member, where it was not named; else empty.
    """

    folder: Path
    member: str
    adapter: str
    reason: str


def export_run(
    path: Path,
    *,
    form: str,
    out: Path | None = None,
    member: str | None = None,
    dtype: str | None = None,
    largest: int = SHARD,
) -> Export:
    """Writes a member of a run for others to use, with a card of the run's facts.

    Args:
        path: a run directory, or a member's folder in it.
        form: `hf`, the adapter merged into the base and all that transformers needs; `peft`, the adapter alone.
        out: a folder that does not exist yet; `FORM` in the member's folder by default.
        member: its name; by default the run's best finished one.
        dtype: of the merged weights; by default each has that of the base's own checkpoint.
        largest: bytes of weights in one file.

    Raises:
        InputError: no such run, member or adapter, the format cannot hold what was trained, or something is at `out`.
    """
    if form not in FORMATS:
        raise InputError(f"--format: '{form}'. {hint(form, FORMATS)}")
    if dtype is not None and (form == "peft" or dtype not in WRITTEN_DTYPES):
        raise InputError(f"--dtype: '{dtype}'. " + ("PEFT's files are float32." if form == "peft" else hint(dtype, WRITTEN_DTYPES)))
    run, chosen, reason = choose_member(path, member)
    if form == "peft" and chosen.config.adapter.method != "lora":
        raise InputError(f"--format peft: member '{chosen.name}' trained '{chosen.config.adapter.method}', no adapter. Take --format hf.")
    adapter = adapter_folder_of(run, chosen).name
    folder = run / member_folder(chosen.name) / form if out is None else out
    check_new(folder, "--out: ")
    result = MemberResult.read(run / member_folder(chosen.name))
    restored = restore_member(run, chosen)
    shape = check_form(restored.model)
    classifier = restored.model if isinstance(restored.model, Classifier) else None
    card = model_card(
        chosen.config,
        result,
        kind=(classifier and head_kind(classifier)) or ("decoder" if shape.base.is_decoder else "encoder"),
        model_type=shape.origin.model_type,
        adapter=adapter,
        form=form,
        environment=read_json(run / "environment.json"),
        classes=restored.classes,
    )
    if form == "hf":
        save_pretrained(restored.model, folder, classes=restored.classes if classifier else None, dtype=dtype, largest=largest, card=card)
    else:
        save_peft(restored.model, folder, card=card)
    return Export(folder, chosen.name, adapter, reason)


def choose_member(path: Path, name: str | None) -> tuple[Path, Member, str]:
    """The run directory, the member, and why it is this one.

    Args:
        path: a run directory, or a member's folder in it.
        name: the member's; by default the run's best finished one.

    Raises:
        InputError: no such run or member, or none has finished.
    """
    run = path
    if not (path / "config.yaml").is_file() and (path.parent / "config.yaml").is_file():
        if name is not None:
            raise InputError(f"--member: {path} names a member already.")
        run, name = path.parent, path.name
    members = run_members(run)
    if name is not None:
        return run, named_member(members, name, str(path) if run != path else "--member"), ""
    if len(members) == 1:
        return run, members[0], ""
    best, reason = _best(run, {m.name for m in members})
    return run, named_member(members, best, str(run)), reason


def _best(run: Path, known: set[str]) -> tuple[str, str]:
    """The best finished member's name, and in what it is."""
    ended = [r for r in read_run(run) if r.status == "finished" and r.name in known]
    if not ended:
        raise InputError(f"{run}: no member has finished yet; name one with --member to take what is saved of it.")
    metric = primary_metric(ended)

    def figure(result: MemberResult) -> float:
        return (result.best or result.final).get(metric.name, float("nan"))

    best = ended[0]
    for result in ended[1:]:
        if metric.better(figure(result), figure(best)):
            best = result
    return best.name, f"best of {len(ended)} by {metric.heading}: {metric.format(figure(best))}"
