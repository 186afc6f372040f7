"""`Exporter`, a format that a trained member is written in, and `export_run`, which writes one.

An exporter is registered with `register_exporter(name, exporter)`; `lora-jax export --format NAME` then writes it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from flax import nnx

from ..analysis.compare import choose_member
from ..config.doors import EXPORTERS
from ..config.doors import register_exporter as register_exporter
from ..errors import InputError, hint
from ..models.encoder_decoder import Base, EncoderDecoder
from ..models.families import find_family
from ..models.families.base import HEAD_CLASSES, Head
from ..models.heads import Classifier
from ..models.layers import HEADS
from ..models.vision import VisionBase
from ..sweeps.restore import Restored, restore_member
from ..tracking import member_folder
from ..tracking.files import check_new, new_folder


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export; None leaves the choice to the exporter.

    Attributes:
        dtype: of the written weights.
        max_shard_size: bytes of weights in one file.
        keep_base: whether what an adapter's init took out of the base's weights stays out: the base that is left is written beside it.
        keep_mask: whether what is 0 in a pruned base's weights stays 0 where an adapter is merged into them.
        requantize: whether merged weights are quantised again, as the base's are.
    """

    dtype: str | None = None
    max_shard_size: int | None = None
    keep_base: bool | None = None
    keep_mask: bool | None = None
    requantize: bool | None = None

    def given(self) -> dict[str, str | int]:
        """Name -> value of the options that are set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What runs an export, in a process of its own: for `lora-jax bench`.

    Attributes:
        file: of the export, by which it is known.
        script: a file of `interop/runtimes/`, or its path. It defines `load(path)`, which gives the inputs ([(name, dims, dtype)]) and a
            function of a dict of arrays; it imports what that takes and nothing else.
        name: for tables.
    """

    file: str
    script: str
    name: str


class Exporter(ABC):
    """A format, one instance each.

    Attributes:
        summary: one line for `lora-jax export --help`.
        default: whether `lora-jax export` takes it where no format is named.
        options: fields of `ExportOptions` that it reads -> their values; an empty tuple allows any.
        runtime: what runs its exports; None where they do not run by themselves.
    """

    summary: ClassVar[str] = ""
    default: ClassVar[bool] = False
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    runtime: ClassVar[Runtime | None] = None

    def can(self, restored: Restored) -> str | None:
        """Why this member cannot be written in this format; None where it can."""
        return None

    @abstractmethod
    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Writes the member's files into `folder`, which exists and is empty. On an error the caller removes it."""


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
            raise InputError(f"{option_flag(name)}: unknown value '{value}'. {hint(str(value), choices)}".rstrip())


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        auto_class: of transformers, that loads any family's model of this kind.
        pipeline: tag of a model card.
        task_type: in PEFT's config; None where PEFT has none.
        head_modules: what PEFT saves with this task type, whichever of them the model has.
    """

    auto_class: str
    pipeline: str
    task_type: str | None
    head_modules: tuple[str, ...] = ()


# Of each kind of head: pipeline tag, task type, PEFT's modules.
_HEADS = (
    ("text-classification", "SEQ_CLS", ("classifier", "score")),
    ("token-classification", "TOKEN_CLS", ("classifier", "score")),
    ("question-answering", "QUESTION_ANS", ("qa_outputs",)),
    ("image-classification", None, ("classifier",)),  # PEFT has no type for it, and none is given
    ("object-detection", None, ("class_labels_classifier", "bbox_predictor")),
)
# A base by itself, or the kind of its head.
KINDS = {
    "encoder": Kind("AutoModel", "feature-extraction", "FEATURE_EXTRACTION"),
    "vision": Kind("AutoModel", "image-feature-extraction", "FEATURE_EXTRACTION"),
    "decoder": Kind("AutoModelForCausalLM", "text-generation", "CAUSAL_LM"),
    "encoder_decoder": Kind("AutoModelForSeq2SeqLM", "text2text-generation", "SEQ_2_SEQ_LM"),
} | {head: Kind(f"AutoModel{HEAD_CLASSES[head]}", *names) for head, names in zip(HEADS, _HEADS, strict=True)}


def kind_of(model: nnx.Module) -> Kind | None:
    """The kind of a model, adapted or not; None where Hugging Face has none for it."""
    modules = [m for _, m in nnx.iter_modules(model)]
    classifier = next((m for m in modules if isinstance(m, Classifier)), None)
    if classifier is not None:
        return KINDS.get(classifier.kind or "")
    base = next((m for m in modules if isinstance(m, Base)), None)
    if isinstance(base, EncoderDecoder | VisionBase):
        return KINDS["encoder_decoder" if isinstance(base, EncoderDecoder) else "vision"]
    return None if base is None else KINDS["decoder" if base.is_decoder else "encoder"]


def head_of(model: Classifier) -> Head | None:
    """The head as the base's family has it; None where the base was not loaded from a checkpoint."""
    origin = model.base.origin
    return None if origin is None or model.kind is None else find_family(origin.config, origin.source).heads(origin.config).get(model.kind)


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
