"""`lora-jax launch`: `train` or `sweep` as several processes on this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, hint
from .options import ConfigPath, Fresh, Overrides, Yes

if TYPE_CHECKING:
    from ..launch.slurm import SlurmOptions

PLACES = ("local", "slurm")
_MOST = 1024  # more is a slip, and would exhaust the machine before anything ran


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where and how to run a config.

    Attributes:
        on: `local` or `slurm`.
        processes: number of processes of one program, on this machine.
        devices: CPU devices per process; the real ones by default.
        parts: number of jobs that share a sweep.
        fresh: rename an old run directory first.
        many: train a sweep of more than 10,000 members.
        wait: return when the jobs have ended.
        slurm: options of the Slurm jobs; keys of `SlurmOptions`.
    """

    on: str = "local"
    processes: int | None = None
    devices: int | None = None
    parts: int = 1
    fresh: bool = False
    many: bool = False
    wait: bool = False
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)


def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option("--on", metavar="PLACE", help="Where to run: local (this machine) or slurm.")] = "local",
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="local: the number of processes of one program.", show_default=False),
    ] = None,
    devices_per_process: Annotated[
        int | None,
        typer.Option("--devices-per-process", metavar="N", min=1, help="CPU only: virtual devices per process.", show_default=False),
    ] = None,
    fresh: Fresh = False,
    yes: Yes = False,
    parts: Annotated[
        int, typer.Option("--parts", metavar="N", min=1, help="slurm: run a sweep as an array of N jobs that share its members.")
    ] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="slurm: wait for the jobs. If one fails, exit with its exit code.")] = False,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="slurm: the partition.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME", help="slurm: the account.", show_default=False)] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", metavar="N", min=1, help="slurm: nodes per job. Default: 1.", show_default=False)
    ] = None,
    tasks_per_node: Annotated[
        int | None,
        typer.Option(
            "--tasks-per-node",
            metavar="N",
            min=1,
            help="slurm: processes per node. Default: --gpus-per-node if given, else 1.",
            show_default=False,
        ),
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option("--cpus-per-task", metavar="N", min=1, help="slurm: cores per process.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="N", min=1, help="slurm: GPUs per node.", show_default=False)
    ] = None,
    mem: Annotated[
        str | None, typer.Option("--mem", metavar="SIZE", help="slurm: memory per node, such as 64G.", show_default=False)
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="LIMIT", help="slurm: MINUTES or HOURS:MINUTES:SECONDS. Default: 60.", show_default=False),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            "--setup",
            metavar="LINE",
            help="slurm: a shell line before the run, such as 'module load cuda'. Repeatable.",
            show_default=False,
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", metavar="KEY=VALUE", help="slurm: another option of sbatch, such as qos=high. Repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Run a config as several processes, or on a Slurm cluster.

    Runs `sweep` if the config has a sweep, else `train`. All processes share each training step, so the config's mesh must use all
    devices (mesh.data: -1). On Slurm a job has --nodes x --tasks-per-node processes. --parts splits a sweep over an array of jobs.
    """
    slurm = slurm_options(
        partition=partition,
        account=account,
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        mem=mem,
        time=time,
        setup=setup,
        sbatch=sbatch,
    )
    options = LaunchOptions(on, processes, devices_per_process, parts, fresh, yes, wait, slurm)
    if code := launch_command(config, overrides or [], options):
        raise typer.Exit(code)


def slurm_options(**given: Any) -> dict[str, Any]:
    """The given options, as keyword arguments of `SlurmOptions`.

    Raises:
        InputError: an `--sbatch` value is not KEY=VALUE.
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
    """Starts the run of a config; returns the exit code of the processes or jobs it waited for.

    Raises:
        InputError: the config or an option is wrong. Nothing was started or written.
        RunError: the processes or jobs could not be started.
    """
    from ..config.load import load_config

    loaded = load_config(config, list(overrides))
    _check(options, has_sweep=loaded.sweep is not None)
    from ..launch.local import run_locally, virtual_devices
    from ..tracking import holds_run, set_aside

    run = Path(loaded.tracking.dir) / loaded.name
    if holds_run(run) and options.fresh:
        print(f"{run}: renamed to {set_aside(run)}", file=sys.stderr)
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
        raise InputError(f"--on: unknown place '{options.on}'. {hint(options.on, PLACES)}")
    if options.on == "local" and (
        foreign := [*options.slurm, *(["parts"] if options.parts > 1 else []), *(["wait"] if options.wait else [])]
    ):
        raise InputError(f"--{foreign[0].replace('_', '-')}: needs --on slurm.")
    if options.on == "slurm" and options.processes is not None:
        raise InputError("--processes: needs --on local. On Slurm use --nodes and --tasks-per-node.")
    for name, count in (("--processes", options.processes), ("--devices-per-process", options.devices)):
        if count is not None and count > _MOST:
            raise InputError(f"{name}: {count:,} on one machine; at most {_MOST:,}.")
    if options.parts > 1 and not has_sweep:
        raise InputError(f"--parts: {options.parts}, but the config has no 'sweep' to split.")
