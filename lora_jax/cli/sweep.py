"""`lora-jax sweep`: all members of a grid, packed."""

from __future__ import annotations

from pathlib import Path

from ..config.errors import InputError
from ..config.load import load_config
from ..config.schema import Config
from .console import results_console


def sweep_command(config: Path, overrides: list[str], *, solo: bool, fresh: bool) -> None:
    """Trains a config's sweep and shows what it came to."""
    loaded = load_config(config, overrides)
    if loaded.sweep is None:
        raise InputError(f"{config}: has no 'sweep'. Add sweep.grid, or run: lora-jax train {config}")
    run_and_report(loaded, solo=solo, fresh=fresh)


def run_and_report(config: Config, *, solo: bool, fresh: bool) -> None:
    """Runs, then writes heat map and report, then prints the table and where things are."""
    from ..analysis import report_run, results_table, write_heatmap
    from ..sweeps.run import run_sweep
    from ..tracking import Progress

    progress = Progress()
    outcome = run_sweep(config, solo=solo, fresh=fresh, progress=progress)
    console = results_console()
    console.print(results_table(outcome.results, title=config.name))
    subtitle = f"{config.task.kind} on {config.task.source.rsplit('/', 1)[-1]}, base {config.model.source.rsplit('://', 1)[-1]}"
    heatmap = write_heatmap(outcome.path / "heatmap.png", outcome.results, title=config.name, subtitle=subtitle)
    report = report_run(outcome.path)
    lines = [f"compiled programs: {outcome.compiled_programs}", f"report:      {report}"]
    lines += [f"heat map:    {heatmap}"] if heatmap else []
    lines += [f"TensorBoard: tensorboard --logdir {outcome.path}"] if config.tracking.tensorboard else []
    for line in lines:
        console.print(line, markup=False)
