"""A run's members and their saved adapters, found again and put back on the base: no data is needed for it.

Evaluating saved adapters again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from ..adapters.inject import fill_member, inject_layout, remember
from ..adapters.layout import resolve, unite
from ..adapters.partition import partition
from ..config.load import load_config, with_values
from ..config.schema import Config
from ..errors import InputError, hint, warn
from ..models.heads import Classifier
from ..models.load import BaseFiles, load_model
from ..packing.pack import Member, Pack, static_key
from ..tasks.base import task_of
from ..tracking import Progress, member_folder, read_state
from ..tracking.results import check_run
from ..tracking.state import STATE, check_identity
from ..training.adapter_files import adapter_identity, load_adapter, saved_classes
from ..training.evaluation import evaluate_pack
from ..training.setup import Preparer, Setup
from ..training.statistics import calibrate
from ..weights.provenance import fingerprint, tokenizer_digest
from ..weights.tokenizer import load_tokenizer
from .space import members_of


def run_members(run: Path) -> list[Member]:
    """The members of a run directory.

    Raises:
        InputError: it is none.
    """
    check_run(run)
    config = load_config(run / "config.yaml", of_run=True)
    known = read_state(run).members  # of all sweeps of this run; older versions wrote none
    if known:
        return [Member(name, settings, with_values(config, settings, where=str(run / STATE))) for name, settings in known.items()]
    return members_of(config, many=True)  # asked about when they were trained


def named_member(members: list[Member], name: str, key: str) -> Member:
    """The member of this name, or whose folder is called so.

    Args:
        members: of a run.
        name: what it is called.
        key: where the name came from, for the message.

    Raises:
        InputError: there is none.
    """
    for member in members:
        if name in (member.name, member_folder(member.name)):
            return member
    raise InputError(f"{key}: no member '{name}'. {hint(name, [m.name for m in members])}".rstrip())


def adapter_folder_of(run: Path, member: Member) -> Path:
    """Where a member's adapter was saved: the best one where that was kept, else the final one.

    Raises:
        InputError: none was.
    """
    folder = next((f for f in (run / member_folder(member.name) / kind for kind in ("best", "final")) if f.is_dir()), None)
    if folder is None:
        raise InputError(f"{run}: member '{member.name}' has no saved adapter (not finished, or tracking.save: none).")
    return folder


def confirm_inputs(run: Path, setup: Setup, config: Config, members: Sequence[Member]) -> tuple[list[str], str | None]:
    """Compares what a set-up has loaded with what the run's members of the same model and task were trained on.

    Args:
        run: the run directory.
        setup: of `config`.
        config: of a member that is trained next.
        members: of the run.

    Returns:
        names of the members that this set-up is of; and what is to be told, once.

    Raises:
        InputError: the base, the tokenizer or the data is another one.
    """
    known = read_state(run).identity
    alike = [m.name for m in members if m.config.model == config.model and m.config.task == config.task]
    told = None
    for name in alike:
        if name in known:
            told = check_identity(f"{run}: member '{name}'", known[name], setup.identity) or told
    return alike, told


def _confirm(run: Path, member: Member, now: dict[str, str], say: Callable[[str], None]) -> None:
    """The same for one saved adapter."""
    then = read_state(run).identity.get(member.name)
    if then is None:
        say(f"{run}: member '{member.name}' was trained by an older version, which did not record base, tokenizer and data.")
    elif (told := check_identity(f"{run}: member '{member.name}'", then, now)) is not None:
        say(told)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A member as it was trained.

    Attributes:
        model: the base in float32, with the task's head and the adapter.
        classes: names of the classes, in the order of the logits; None where there are none.
        folder: the saved adapter's.
        run: the run directory.
        member: of it.
    """

    model: nnx.Module
    classes: tuple[str, ...] | None
    folder: Path
    run: Path
    member: Member


def restore_member(run: Path, member: Member, *, readout: bool = False) -> Restored:
    """A member's saved adapter on its base.

    The base is float32 whatever it was while training: what is made of the two is then rounded once.

    Args:
        readout: whether a decoder that answers with the words of classes is to read out these alone, as in training.

    Raises:
        InputError: the base is not where it was or not what it was, no adapter was saved, or it is damaged or fits another model.
    """
    folder, config = adapter_folder_of(run, member), member.config
    section, task = config.task, task_of(config.task)
    classes = saved_classes(folder) or task.named_classes(section)
    of, head = config.model, task.loaded_head(section)
    options: dict[str, Any] = {"transforms": of.transforms, "quantized": of.quantized, "train_batch_stats": of.train_batch_stats}
    loaded = load_model(of.source, head=head, calibrate=calibrate, **options)
    base = loaded.base if isinstance(loaded, Classifier) else loaded
    if classes is None and task.needs_classes(section, decoder=base.is_decoder):
        raise InputError(f"{folder}: does not record its classes; list them, in order, as task.labels in {run / 'config.yaml'}.")
    tokenizer = load_tokenizer(config.model.source) if task.tokenized else None
    words = task.class_tokens(section, classes, tokenizer, decoder=base.is_decoder) if readout else None
    model = loaded if isinstance(loaded, Classifier) else task.model(section, base, classes, words)
    spec = resolve(model, config.adapter)
    known = _fingerprint_as_trained(base, config, task.loaded_head(section))
    _confirm(run, member, {"base": known, "tokenizer": "" if tokenizer is None else tokenizer_digest(tokenizer)}, warn)
    adapted = inject_layout(model, unite(model, [spec]))
    fill_member(adapted, spec, None)
    part = partition(adapted)
    kept = part.kept(part.settings)
    arrays = load_adapter(folder, part.trainable | kept, adapter_identity(known, spec))
    settings = part.settings | {name: arrays.pop(name) for name in kept}
    filled = part.merge(arrays, settings, part.frozen, training=False)
    remember(filled, config.adapter)
    return Restored(filled, classes, folder, run, member)


def _fingerprint_as_trained(base: nnx.Module, config: Config, head: str | None) -> str:
    """Of a float32 base in the dtype that the member was trained over.

    A transformed base is loaded again in that dtype, for what a transform chooses may depend on it; the numbers of `base` are set to those
    that the member was trained over.
    """
    model = config.model
    if model.dtype == "float32":
        return fingerprint(base)
    files = BaseFiles(model.source, dtype=model.dtype, head=head, transforms=model.transforms, quantized=model.quantized)
    if not model.transforms:
        return fingerprint(base, files.base)
    loaded = files.load(calibrate=calibrate)
    own = loaded.base if isinstance(loaded, Classifier) else loaded
    held = dict(nnx.iter_graph(own))
    for path, variable in nnx.iter_graph(base):
        if isinstance(variable, nnx.Param):
            variable.set_value(held[path][...].astype(variable.dtype))
    return fingerprint(own)


SPLITS = {"eval": "held_out", "test": "test", "train": "train"}  # name -> part of the run's identity


# What the base alone is called among the members.
BASE = "(base)"


def evaluate_run(run: Path, *, member: str | None, split: str, progress: Progress, base: bool = False) -> dict[str, dict[str, float]]:
    """Metrics of a run's saved adapters, the best of each member where that was kept.

    Args:
        run: a run directory.
        member: one member's name; all by default.
        split: `eval` (held-out rows), `test` or `train`.
        progress: the console.
        base: whether the base alone is evaluated too, before the members: with the first one's adapter as it starts, which changes
            nothing. A new head then is as it is drawn.

    Returns:
        member name -> metric -> value; the base's name is `BASE`.

    Raises:
        InputError: not a run directory, no such member or split, no saved adapter, or one that is damaged.
    """
    if split not in SPLITS:
        raise InputError(f"--split: unknown split '{split}'. {hint(split, SPLITS)}")
    members = run_members(run)
    chosen = members if member is None else [named_member(members, member, "--member")]
    results: dict[str, dict[str, float]] = {}
    prepare = Preparer()
    jobs = [*((one, True) for one in chosen[: int(base)]), *((one, False) for one in chosen)]
    with progress.track(len(jobs), "evaluating") as track:
        for number, (one, at_start) in enumerate(jobs, 1):
            folder = None if at_start else adapter_folder_of(run, one)
            setup = prepare(one.config)
            examples = {"eval": setup.data.held_out, "test": setup.data.test, "train": setup.data.train}[split]
            if examples is None:
                raise InputError(f"--split: {run} has no test rows (neither task.test_source nor task.test_size).")
            unused = set(SPLITS.values()) - {SPLITS[split]}
            _confirm(run, one, {part: digest for part, digest in setup.identity.items() if part not in unused}, progress.print)
            # In shapes that hold all members of its form: one program evaluates them, whatever their ranks and targets.
            alike = [m.config for m in chosen if static_key(m.config) == static_key(one.config)]
            seen = setup.statistics([one.config]) if at_start else None
            options = {"layout": setup.layout(alike), "drawn": at_start, "statistics": seen, "objective": setup.objective(one.config)}
            pack = Pack.build(setup.model, [one.config], setup.steps, setup.mesh, **options)
            pack.programs = setup.programs.get(pack.program_key, lambda pack=pack: pack.programs)
            arrays = pack.state.trainable
            if folder is not None:
                identity = adapter_identity(setup.fingerprint, setup.spec(one.config))
                own = pack.member_arrays(setup.model, 0, arrays | pack.kept)
                arrays = pack.with_member_arrays(setup.model, 0, load_adapter(folder, own, identity))
                pack.keep({name: arrays.pop(name) for name in pack.kept})
            metrics = evaluate_pack(pack, setup, arrays, examples)
            numbers = {name: float(values[0]) for name, values in metrics.items() if name not in setup.metrics.tables}
            results[BASE if at_start else one.name] = numbers
            track.update(number)
    return results
