"""`lora-jax launch`: `train` or `sweep` as several processes of this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.load import load_config
from ..errors import InputError, hint

if TYPE_CHECKING:
    from ..launch.slurm import SlurmOptions

PLACES = ("local", "slurm")


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where and how to run a config.

    Attributes:
        on: `local` or `slurm`.
        processes: of one program, on this machine.
        devices: CPU devices each process is to see; its own by default.
        parts: jobs that share a sweep.
        fresh: set an old run aside first.
        many: train a sweep of more than 10,000 members.
        wait: return when the jobs have ended.
        slurm: what to ask Slurm for; keys of `SlurmOptions`.
    """

    on: str = "local"
    processes: int | None = None
    devices: int | None = None
    parts: int = 1
    fresh: bool = False
    many: bool = False
    wait: bool = False
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)


def slurm_options(**given: Any) -> dict[str, Any]:
    """The options that were given, as `SlurmOptions` takes them.

    Raises:
        InputError: an `--sbatch` is not KEY=VALUE.
    """
    options = {key: value for key, value in given.items() if value not in (None, [])}
    if "setup" in options:
        options["setup"] = tuple(options["setup"])
    if "sbatch" in options:
        pairs = [text.partition("=") for text in options["sbatch"]]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise InputError(f"--sbatch: '{wrong[0]}' is not KEY=VALUE, such as qos=high.")
        options["sbatch"] = {key: value for key, _, value in pairs}
    if "gpus_per_node" in options:  # a process for each GPU, as JAX expects of Slurm
        options.setdefault("tasks_per_node", options["gpus_per_node"])
    return options


def launch_command(config: Path, overrides: Sequence[str], options: LaunchOptions) -> int:
    """Starts the run of a config; returns the exit code of what was waited for.

    Raises:
        InputError: the config or the options will not do. Nothing was started or written.
        RunError: it could not be started.
    """
    loaded = load_config(config, list(overrides))
    _check(options, has_sweep=loaded.sweep is not None)
    from ..launch.local import run_locally, virtual_devices
    from ..tracking import holds_run, set_aside

    run = Path(loaded.tracking.dir) / loaded.name
    if holds_run(run) and options.fresh:
        print(f"{run}: set aside as {set_aside(run)}", file=sys.stderr)
    command = [sys.executable, "-m", "lora_jax.cli.main", "train" if loaded.sweep is None else "sweep", str(config), *overrides]
    command += ["--yes"] if options.many and loaded.sweep is not None else []
    environment = virtual_devices(options.devices, os.environ) if options.devices else {}
    if options.on == "local":
        return run_locally(command, options.processes or 1, logs=run / "logs", environment=environment)

    from ..launch.slurm import SlurmOptions

    return _submit(command, options, SlurmOptions(**options.slurm), run, environment)


def _submit(command: list[str], options: LaunchOptions, slurm: SlurmOptions, run: Path, environment: dict[str, str]) -> int:
    from ..launch import slurm as launch_slurm

    parts = [[*command, "--part", f"{i + 1}/{options.parts}"] for i in range(options.parts)] if options.parts > 1 else [command]
    job = launch_slurm.submit(parts, slurm, name=f"lora-jax:{run.name}", logs=run / "logs", environment=environment)
    array = f"_0 to {job}_{options.parts - 1}" if options.parts > 1 else ""
    print(f"submitted job {job}{array}; output below {run / 'logs'}", file=sys.stderr)
    return launch_slurm.wait(job, lambda text: print(text, file=sys.stderr)) if options.wait else 0


def _check(options: LaunchOptions, *, has_sweep: bool) -> None:
    if options.on not in PLACES:
        raise InputError(f"--on: '{options.on}'. {hint(options.on, PLACES)}")
    if options.on == "local" and (
        foreign := [*options.slurm, *(["parts"] if options.parts > 1 else []), *(["wait"] if options.wait else [])]
    ):
        raise InputError(f"--{foreign[0].replace('_', '-')} belongs to --on slurm.")
    if options.on == "slurm" and options.processes is not None:
        raise InputError("--processes belongs to --on local; on Slurm their number is --nodes times --tasks-per-node.")
    if options.parts > 1 and not has_sweep:
        raise InputError(f"--parts: {options.parts}, but the config has no 'sweep' to share.")
