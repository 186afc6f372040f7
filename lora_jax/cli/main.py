"""The `lora-jax` command: what can be called, and how failures are told.

A command's own module (and with it JAX) is imported when the command runs, so `--help` and `schema` answer at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, RunError, Stopped
from ..parallel import processes
from .export import ExportHelp
from .options import ConfigPath, Coordinator, ExtendSteps, Fresh, Overrides, ProcessCount, ProcessId, StartTimeout, Yes

app = typer.Typer(
    name="lora-jax",
    help="Train and compare low-rank adapters over one frozen base model, many at a time.",
    epilog="Start with: lora-jax doctor, then lora-jax sweep configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help is plain text: [a, b] in it is a YAML list and not markup
    pretty_exceptions_enable=False,  # failures are told by main(), below
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _with_extension(overrides: list[str] | None, steps: int | None) -> list[str]:
    return [*(overrides or []), *([] if steps is None else [f"training.extend_steps={steps}"])]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-jax {importlib.metadata.version('lora-jax')}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command as a whole; --version leaves before any command runs."""


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    extend_steps: ExtendSteps = None,
    coordinator: Coordinator = None,
    process_id: ProcessId = None,
    process_count: ProcessCount = None,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Train one adapter.

    Writes runs/NAME/: the resolved config, TensorBoard events, results and checkpoints. Called again, it goes on where it
    stopped; a run directory that holds another config is refused. Told to stop (SIGTERM, Ctrl-C), it saves a checkpoint first and
    exits with 75 (130 for Ctrl-C).
    """
    from .train import train_command

    joining = processes.Joining(coordinator, process_id, process_count, start_timeout)
    train_command(config, _with_extension(overrides, extend_steps), fresh=fresh, joining=joining)


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    solo: Annotated[bool, typer.Option("--solo", help="Train each member by itself, to compare with: same results, more time.")] = False,
    fresh: Fresh = False,
    extend_steps: ExtendSteps = None,
    yes: Yes = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Train part I of N of the members, while others train the rest into the same run.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show packs, members, memory, FLOPs and expected time; train nothing and write nothing.")
    ] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            "--retry",
            metavar="NAME",
            help="Try a member that failed or diverged again: its name, or a pattern as 'rank=8,*'; repeatable.",
            show_default=False,
        ),
    ] = None,
    coordinator: Coordinator = None,
    process_id: ProcessId = None,
    process_count: ProcessCount = None,
    start_timeout: StartTimeout = 300.0,
) -> None:
    """Train all members of a sweep over one frozen base.

    The members are those of the config's `sweep` (grid, zip, random, members, seeds), packed into as few compiled programs as possible.
    Writes runs/NAME/ with a folder a member, results.csv and a report.
    """
    from .sweep import sweep_command

    joining = processes.Joining(coordinator, process_id, process_count, start_timeout)
    sweep_command(
        config,
        _with_extension(overrides, extend_steps),
        solo=solo,
        fresh=fresh,
        many=yes,
        part=part,
        plan=plan,
        retry=retry or [],
        joining=joining,
    )


@app.command()
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option("--on", metavar="PLACE", help="Where: local (this machine) or slurm.")] = "local",
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="local: processes that run as one program.", show_default=False)
    ] = None,
    devices_per_process: Annotated[
        int | None,
        typer.Option("--devices-per-process", metavar="N", min=1, help="CPU only: devices each process is to see.", show_default=False),
    ] = None,
    fresh: Fresh = False,
    yes: Yes = False,
    parts: Annotated[
        int, typer.Option("--parts", metavar="N", min=1, help="slurm: a sweep as an array of N jobs that share its members.")
    ] = 1,
    wait: Annotated[
        bool, typer.Option("--wait", help="slurm: return when the jobs have ended, with the exit code of one that failed.")
    ] = False,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="slurm: the partition.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME", help="slurm: the account.", show_default=False)] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", metavar="N", min=1, help="slurm: nodes of each job; 1.", show_default=False)
    ] = None,
    tasks_per_node: Annotated[
        int | None,
        typer.Option(
            "--tasks-per-node", metavar="N", min=1, help="slurm: processes on a node; --gpus-per-node or else 1.", show_default=False
        ),
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option("--cpus-per-task", metavar="N", min=1, help="slurm: cores of each process.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="N", min=1, help="slurm: GPUs of each node.", show_default=False)
    ] = None,
    mem: Annotated[
        str | None, typer.Option("--mem", metavar="SIZE", help="slurm: memory of each node, as 64G.", show_default=False)
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="LIMIT", help="slurm: MINUTES or HOURS:MINUTES:SECONDS; 60.", show_default=False)
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            "--setup", metavar="LINE", help="slurm: a shell line before the run, as 'module load cuda'; repeatable.", show_default=False
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", metavar="KEY=VALUE", help="slurm: any other option of sbatch, as qos=high; repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Run a config as several processes, or on a Slurm cluster.

    Runs train, or sweep where the config has one. Several processes share each training step: set the config's mesh (mesh.data: -1
    takes all devices there are). On Slurm a job has --nodes times --tasks-per-node of them, and --parts makes a sweep an array.
    """
    from .launch import LaunchOptions, launch_command, slurm_options

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


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, such as runs/quickstart.", show_default=False)],
    metric: Annotated[str | None, typer.Option("--metric", metavar="NAME", help="What to compare by, such as loss.")] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", metavar="KEY=VALUE", help="Differences to members with this value; repeatable. The best by default."),
    ] = None,
) -> None:
    """Compare finished runs.

    One table of all members, with intervals over seeds where a setting was run with several, and differences paired by seed where
    members trained on the same data for as many steps; then one of each setting at its best learning rate.
    """
    from .compare import compare_command

    compare_command(runs, metric, reference or [])


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="Which member of a sweep; all by default.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="Which rows: eval (held out) or train.")] = "eval",
) -> None:
    """Evaluate a run's saved adapters again."""
    from .evaluate import evaluate_command

    evaluate_command(run, member=member, split=split)


@app.command()
def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|MODEL",
            help="A run directory or a member's folder in it; a config: its run, or its base where it was not trained yet; or a model: "
            "a folder, a .safetensors or .gguf file, hf://org/name, package://import_name/path.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; repeatable.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Prompts, one a line, as one batch.", show_default=False)
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--member", metavar="NAME", help="Which member of a sweep; the best finished one by default.", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="MODEL only: a PEFT adapter to put on it.", show_default=False)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Prompts are what a user says. Without any it is a conversation, in the terminal or a line a turn from stdin."
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="--chat: the system message it begins with.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens of total probability P (nucleus).", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Sampling seed; prompt i has seed N + i.")] = 0,
) -> None:
    """Generate text after prompts, or hold a conversation.

    With a trained member of a run, or with any model. The text of one prompt is printed as it is generated; of several when all are done.
    """
    from .generate import Request, generate_command

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    generate_command(Request(source, member, adapter, tuple(prompt or ()), file, chat, system, options))


@app.command(cls=ExportHelp)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN[/MEMBER]", help="A run directory, or a member's folder in it.", show_default=False)],
    form: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Name of an exporter; the list is below.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="A new folder; FORMAT in the member's own by default.", show_default=False)
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--member", metavar="NAME", help="Which member of a sweep; the best finished one by default.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Of the weights; that of the base's own files by default.", show_default=False),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of weights; 5GB by default.", show_default=False),
    ] = None,
) -> None:
    """Write a run's best member for other libraries.

    Takes the member's best adapter where it was kept, else the final one. Merging runs in float32 and is rounded once. A README.md
    holds the run's settings and metrics. Nothing is overwritten.
    """
    from .export import export_command

    export_command(run, form=form, out=out, member=member, dtype=dtype, max_shard_size=max_shard_size)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="An experiment's YAML file, to be told what it will take.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show devices, memory, versions, and what is missing.

    With a config also where each parameter will lie on the mesh, and the memory that each device will need: before anything is
    loaded.
    """
    from .doctor import doctor_command
    from .placement import placement_command

    ready = doctor_command()
    if config is not None:
        placement_command(config, overrides or [])
    if not ready:
        raise typer.Exit(1)


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file instead of the screen.", show_default=False)
    ] = None,
) -> None:
    """Print the config's JSON schema.

    Editors use it to complete and check configs: write it to a file and name that in the YAML's first line,
    # yaml-language-server: $schema=FILE
    """
    from .schema import schema_command

    schema_command(output)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed while running, 2 wrong input, 75 stopped by SIGTERM, 130 by Ctrl-C."""
    try:
        app()
    except Stopped as stopped:
        print(f"{stopped}; everything is saved, and the same command goes on from there.", file=sys.stderr)
        sys.exit(130 if stopped.signal == signal.SIGINT else 75)
    except Exception as error:
        if os.environ.get("LORA_JAX_TRACEBACK"):
            raise
        # Plain text and no wrapping, so that paths and keys in a message can be copied and searched for.
        print(f"error: {_told(error)}", file=sys.stderr)
        processes.leave(2 if isinstance(error, InputError) else 1)


def _told(error: Exception) -> str:
    if isinstance(error, (InputError, RunError)):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}\nThis was not foreseen. LORA_JAX_TRACEBACK=1 shows where it happened."


if __name__ == "__main__":
    main()
