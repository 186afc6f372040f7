"""`lora-jax launch` as a user meets it: what it starts, what it refuses before anything is written, what becomes of an old run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_jax.errors import InputError, RunError
from lora_jax.launch import local as launch_local
from lora_jax.launch import slurm as launch_slurm
from lora_jax.launch.slurm import SlurmOptions, minutes, submit
from tests.tiny_hub import call

GRID = {"sweep": {"grid": {"adapter.rank": [2, 4]}}}


@pytest.fixture
def started(monkeypatch):
    """Puts stand-ins behind both places; gives what they were called with."""
    calls = []

    def local(command, count, *, logs, environment):
        calls.append(("local", command[3:], count, logs, environment))
        return 0

    def slurm(commands, options, *, name, logs, environment):
        calls.append(("slurm", [c[3:] for c in commands], options, name, logs, environment))
        return "12"

    monkeypatch.setattr(launch_local, "run_locally", local)
    monkeypatch.setattr(launch_slurm, "submit", slurm)
    return calls


def test_local_runs_train_or_sweep(hub, tmp_path, started):
    path, logs = hub.write(tmp_path), tmp_path / "runs" / "tiny" / "logs"
    assert call("launch", path, "adapter.rank=4", "--processes", 3).code == 0
    swept = hub.write(tmp_path, GRID, name="swept")
    assert call("launch", swept, "--on", "local", "--devices-per-process", 4, "--yes").code == 0
    (_, train, count, where, environment), (_, sweep, one, _, devices) = started
    assert (train, count, where, environment) == (["train", str(path), "adapter.rank=4"], 3, logs, {})
    assert (sweep, one) == (["sweep", str(swept), "--yes"], 1)
    assert devices["JAX_PLATFORMS"] == "cpu" and "device_count=4" in devices["XLA_FLAGS"]


def test_slurm_is_asked_for_what_was_given(hub, tmp_path, started):
    path = hub.write(tmp_path, GRID)
    words = ["--partition", "p", "--nodes", "2", "--gpus-per-node", "8", "--mem", "64G", "--time", "2:00:00"]
    words += ["--sbatch", "qos=high", "--sbatch", "gres=x=1"]
    result = call("launch", path, "--on", "slurm", "--parts", 2, "--setup", "module load cuda", *words)
    assert result.code == 0 and "submitted job 12_0 to 12_1; output below" in result.err
    ((_, commands, options, name, logs, _),) = started
    assert commands == [["sweep", str(path), "--part", "1/2"], ["sweep", str(path), "--part", "2/2"]]
    assert options == SlurmOptions(
        partition="p",
        nodes=2,
        tasks_per_node=8,  # JAX has a process for each GPU there
        gpus_per_node=8,
        mem="64G",
        time="2:00:00",
        setup=("module load cuda",),
        sbatch={"qos": "high", "gres": "x=1"},
    )
    assert (name, logs) == ("lora-jax:tiny", tmp_path / "runs" / "tiny" / "logs")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--on", "slrum"], "--on: unknown place 'slrum'. Did you mean 'slurm'?"),
        (["--nodes", "2"], "--nodes: needs --on slurm"),
        (["--cpus-per-task", "2"], "--cpus-per-task: needs --on slurm"),
        (["--parts", "2"], "--parts: needs --on slurm"),
        (["--wait"], "--wait: needs --on slurm"),
        (["--on", "slurm", "--processes", "2"], "--processes: needs --on local"),
        (["--on", "slurm", "--parts", "2"], "--parts: 2, but the config has no 'sweep'"),
        (["--on", "slurm", "--sbatch", "qos"], "--sbatch: 'qos' is not KEY=VALUE"),
        (["--processes", "0"], "'--processes'"),
        (["adapter.rnak=4"], "Did you mean 'adapter.rank'?"),
    ],
)
def test_what_is_refused_before_anything_is_written(hub, tmp_path, started, words, told):
    result = call("launch", hub.write(tmp_path), *words)
    assert result.code == 2 and told in result.err and "Traceback" not in result.err
    assert not started and not (tmp_path / "runs").exists()


def test_without_slurm(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("launch", hub.write(tmp_path), "--on", "slurm")
    assert result.code == 1 and result.err.startswith("error: --on slurm: sbatch was not found;")
    with pytest.raises(RunError):
        submit([["true"]], SlurmOptions(), name="x", logs=tmp_path)


@pytest.mark.parametrize("text", ["", "1h", "1:30", "-5", "1-2"])
def test_times_that_are_none(text):
    with pytest.raises(InputError, match="--time"):
        minutes(text)


def test_fresh_sets_an_old_run_aside_but_not_one_that_runs(hub, tmp_path, started):
    path, run = hub.write(tmp_path), tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: tiny\n")
    code = (
        "import sys; from pathlib import Path; from lora_jax.tracking import files as lock\n"
        "lock.acquire(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    refused = call("launch", path, "--fresh")
    assert refused.code == 2 and "another process is writing to this run" in refused.err and not started
    holder.communicate()
    assert call("launch", path, "--fresh").code == 0
    assert (tmp_path / "runs" / "tiny.old-1" / "config.yaml").exists() and not run.exists() and len(started) == 1


def test_a_folder_that_is_no_run_is_left_alone(hub, tmp_path, started):
    path, run = hub.write(tmp_path), tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("do not touch")
    result = call("launch", path, "--fresh")
    assert result.code == 2 and "is not a run directory" in result.err and not started


@pytest.mark.slow
def test_bad_input_in_the_processes_leaves_room_for_the_mended_config(hub, tmp_path):
    path = hub.write(tmp_path, {"model.source": str(tmp_path / "nowhere")})
    result = call("launch", path, "--processes", 1, "--devices-per-process", 1)
    assert result.code == 2
    run = tmp_path / "runs" / "tiny"
    assert [p.name for p in run.iterdir()] == ["logs"]
    from lora_jax.tracking import holds_run

    assert not holds_run(run)
