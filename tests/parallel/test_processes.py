"""Processes that run one program: how they find one another, what they are told when they do not, and that they change no loss."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_jax.errors import InputError
from lora_jax.parallel import processes
from lora_jax.parallel.processes import Joining, find_cluster, join
from tests.tiny import quick_compile
from tests.tiny_hub import call

STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, None),
        (STEP | {"SLURM_NTASKS": "2"}, "Slurm"),
        (STEP | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in a batch script, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "host-0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU"),
        (POD | {"JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        (POD, None),  # any pod has it
    ],
)
def test_signs_of_a_cluster(env, found):
    assert find_cluster(env) == found


@pytest.mark.parametrize(
    ("joining", "told"),
    [
        (Joining(coordinator="a:1"), "go together; missing: --process-id, --process-count."),
        (Joining(index=0, count=2), "missing: --coordinator."),
        (Joining("nowhere", 0, 2), "--coordinator: 'nowhere' is not HOST:PORT"),
        (Joining("host:0", 0, 2), "--coordinator: 'host:0' is not HOST:PORT"),
        (Joining("host:99999", 0, 2), "is not HOST:PORT"),
        (Joining("host:1", 2, 2), "--process-id: 2, but the processes are 0 to 1."),
        (Joining("host:1", -1, 2), "--process-id: -1, but"),
    ],
)
def test_wrong_words(joining, told):
    with pytest.raises(InputError) as caught:
        join(joining, {})
    assert told in str(caught.value)


def test_alone_is_alone():
    join(Joining(), {})
    join(Joining(count=1), STEP | {"SLURM_NTASKS": "2"})  # asked to stay alone on a cluster
    assert processes.process_count() == 1 and processes.is_writer()
    assert processes.writer_first(lambda: 5) == 5 and processes.writer_says(False) is False


def test_alone_costs_nothing():
    code = (
        "import sys; from lora_jax.parallel.processes import Joining, join, is_writer, writer_first\n"
        "join(Joining()); is_writer(); writer_first(int)\n"
        "assert not {'jax', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(*words, devices=4):
    """(words, environment) of the command line in a process of its own that sees so many CPU devices."""
    env = {
        **os.environ,
        "PYTHONPATH": ROOT,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
    }
    return [sys.executable, "-m", "lora_jax.cli.main", *map(str, words)], env


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.long)])
def test_others_that_do_not_come_are_told_of_in_time(hub, tmp_path, index):
    path = hub.write(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    words, env = command("train", path, "--coordinator", address, "--process-id", index, "--process-count", 2, "--start-timeout", 3)
    began = time.monotonic()
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    first = f"error: process {index} of 2: waited 3 s for the coordinator at {address}, and not all processes came."
    assert done.stderr.splitlines()[0] == first and len(done.stderr.splitlines()) == 2
    assert time.monotonic() - began < 60 and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_cluster_that_jax_does_not_know_is_an_error(hub, tmp_path):
    path = hub.write(tmp_path)
    words, env = command("train", path)
    done = subprocess.run(words, env=env | {"OMPI_COMM_WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: could not join the other processes of this Open MPI job: ")
    assert "--process-count 1 to run alone" in done.stderr and len(done.stderr.splitlines()) == 2


def written(hub, folder, mesh, **changes):
    """A config of two members for eight devices that writes down every step's loss."""
    values = {"mesh": mesh, "sweep": {"grid": {"adapter.rank": [2, 3]}}, "tracking.log_every": 1, "training.batch_size": 16}
    return hub.write(folder, values | {"task.eval_size": 16, "training.steps": 8, "training.eval_every": 4} | changes)


def curves(run):
    """Member -> (losses of the steps, held-out losses), from the events."""
    found = {}
    for folder in sorted(run.glob("rank=*")):
        events = EventAccumulator(str(folder)).Reload()
        found[folder.name] = [np.array([e.value for e in events.Scalars(tag)]) for tag in ("train/loss", "eval/loss")]
    return found


def assert_same(curves_a, curves_b):
    assert set(curves_a) == set(curves_b) == {"rank=2", "rank=3"}
    for name, (steps, held_out) in curves_a.items():
        assert len(steps) == 8 and len(held_out) == 2
        np.testing.assert_allclose(steps, curves_b[name][0], rtol=1e-5)
        np.testing.assert_allclose(held_out, curves_b[name][1], rtol=1e-5)
    # Members and steps differ, so that equal losses say something.
    assert np.ptp(curves_a["rank=2"][0]) > 0.02 and np.abs(curves_a["rank=2"][0] - curves_a["rank=3"][0]).max() > 1e-4


@pytest.fixture(scope="module")
def one_process(hub, tmp_path_factory):
    """The curves of one process with eight devices, in the mesh of eight along `data`."""
    folder = tmp_path_factory.mktemp("one")
    with quick_compile():
        result = call("sweep", written(hub, folder, {"data": 8}))
    assert result.code == 0, result.err
    return curves(folder / "runs" / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": -1}, marks=pytest.mark.long),
        pytest.param({"fsdp": 8}, marks=pytest.mark.long),
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"sweep": 2, "data": 4}, marks=pytest.mark.long),
    ],
)
def test_two_processes_have_the_losses_of_one(hub, tmp_path, one_process, mesh):
    path = written(hub, tmp_path, mesh)
    words, env = command("launch", path, "--on", "local", "--processes", 2, "--devices-per-process", 4)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == 0, done.stderr + (run / "logs" / "process-1.log").read_text()
    assert_same(curves(run), one_process)
    # One of them wrote and spoke.
    assert all(len(list(member.glob("events*"))) == 1 for member in run.glob("rank=*"))
    assert done.stderr.count("compiling") == 1 and "compiled programs: 2" in done.stdout
    # (The collectives' own library is never quite silent.)
    assert not re.search("pack|member|Warning|Traceback|rror", (run / "logs" / "process-1.log").read_text())
    assert [row["status"] for row in csv.DictReader((run / "results.csv").open())] == ["finished"] * 2


@pytest.mark.long
def test_two_processes_are_stopped_and_one_goes_on(hub, tmp_path):
    steps = {"training.steps": 400, "training.eval_every": 0, "training.batch_size": 8}
    path = written(hub, tmp_path, {"data": 8}, **steps)
    words, env = command("launch", path, "--on", "local", "--processes", 2, "--devices-per-process", 4, "tracking.log_every=10")
    launched = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "tiny"
    until = time.monotonic() + 600
    while not any(re.search(rb"train/loss", file.read_bytes()) for file in run.glob("rank=2/events*")):
        assert launched.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    launched.send_signal(signal.SIGTERM)
    _, told = launched.communicate(timeout=300)
    assert launched.returncode == 75, told
    stopped = int(re.search(r"stopped after step (\d+); everything is saved", told)[1])
    assert 0 < stopped < 400
    with quick_compile():
        result = call("sweep", path, "tracking.log_every=10")
    assert result.code == 0 and f"continues after step {stopped}" in result.err
    assert [row["steps"] for row in csv.DictReader((run / "results.csv").open())] == ["400"] * 2
