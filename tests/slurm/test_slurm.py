"""`launch --on slurm` on a real Slurm: its daemons run on loopback for these tests (`start_slurm.sh`).

Run by `make test-slurm`, which installs what is missing.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
START = Path(__file__).parent / "start_slurm.sh"
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment variables of processes that use a Slurm of these tests' own."""
    if any(shutil.which(program) is None for program in ("munged", "slurmctld", "slurmd", "sbatch")):
        pytest.skip("needs Slurm: tests/slurm/install_slurm.sh, or apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["sh", str(START), "start", str(folder)], capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stdout + started.stderr
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
    }
    subprocess.run(["sh", str(START), "stop", str(folder)], check=True, timeout=60)


def launch(env, *words, timeout=900):
    """`lora-jax launch WORDS --on slurm --wait`."""
    command = [sys.executable, "-m", "lora_jax.cli.main", "launch", *map(str, words), "--on", "slurm", "--wait", "--time", "30"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def said(run):
    """All that the jobs of a run said, to show where one failed."""
    return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted((run / "logs").glob("*/*_log.*")))


def rows(run):
    return list(csv.DictReader((run / "results.csv").open()))


def test_two_tasks_are_one_program(slurm, hub, tmp_path):
    path = hub.write(tmp_path, {"mesh": {"data": 8}, "training.batch_size": 16, "task.eval_size": 16})
    done = launch(slurm, path, "--tasks-per-node", 2, "--devices-per-process", 4)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == 0, done.stderr + said(run)
    job = done.stderr.split("submitted job ")[1].split(";")[0]
    assert f"job {job}: completed" in done.stderr
    assert [(row["name"], row["status"]) for row in rows(run)] == [("main", "finished")]
    assert json.loads((run / "environment.json").read_text())["devices"]["count"] == 8
    # The first task speaks, the second does not.
    logs = [(run / "logs" / job / f"{job}_{task}_log.err").read_text() for task in (0, 1)]
    assert "compiling" in logs[0] and "compiling" not in logs[1]


def test_a_sweep_as_an_array(slurm, hub, tmp_path):
    grid = {"sweep": {"grid": {"adapter.rank": [2, 3], "training.seed": [0, 1]}}}
    path = hub.write(tmp_path, grid)
    done = launch(slurm, path, "--parts", 2, "--devices-per-process", 1)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == 0, done.stderr + said(run)
    job = done.stderr.split("submitted job ")[1].split("_0 to")[0]
    assert f"job {job}_0: completed" in done.stderr and f"job {job}_1: completed" in done.stderr
    names = ["rank=2,seed=0", "rank=2,seed=1", "rank=3,seed=0", "rank=3,seed=1"]
    assert [row["name"] for row in rows(run)] == names and (run / "report.html").exists()
    # Each trained its own two.
    logs = [(run / "logs" / f"{job}_{part}" / f"{job}_{part}_0_log.err").read_text() for part in (0, 1)]
    assert all("pack 1/1: 2 members" in log for log in logs)
    # And the numbers are those of one process that trains all.
    command = [sys.executable, "-m", "lora_jax.cli.main", "sweep", str(path), "name=whole"]
    one = {**slurm, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    whole = subprocess.run(command, env=one, capture_output=True, text=True, timeout=900)
    assert whole.returncode == 0, whole.stderr
    for shared, alone in zip(rows(run), rows(run.with_name("whole")), strict=True):
        assert shared["name"] == alone["name"]
        assert float(shared["final_loss"]) == pytest.approx(float(alone["final_loss"]), rel=1e-5)


def test_a_job_that_fails_gives_its_exit_code(slurm, hub, tmp_path):
    path = hub.write(tmp_path, {"model.source": str(tmp_path / "nowhere"), "mesh": {"data": -1}})
    done = launch(slurm, path, "--tasks-per-node", 2, "--devices-per-process", 1)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == 2, done.stderr + said(run)
    assert ": failed" in done.stderr and "error: model.source: " in said(run)


def test_what_slurm_refuses_is_told(slurm, hub, tmp_path):
    done = launch(slurm, hub.write(tmp_path), "--partition", "nosuch")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: Slurm rejected the job: ") and "invalid partition" in done.stderr
