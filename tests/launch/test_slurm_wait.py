"""How jobs ended, from lists of Slurm's that forget those that ended some minutes ago."""

from __future__ import annotations

import subprocess

import pytest

from lora_jax.errors import RunError
from lora_jax.launch import slurm


def entry(task, state, code="0:0"):
    return f"JobId=1{task[0]} ArrayJobId=7 ArrayTaskId={task} JobState={state} Reason=None ExitCode={code}"


GONE = "slurm_load_jobs error: Invalid job id specified"


@pytest.fixture
def waited(monkeypatch):
    """Waits while Slurm lists these one after the other; gives the exit code and what was said."""

    def run(*lists, accounting=None):
        left = iter(lists)

        def asked(command, **_):
            if command[0] == "sacct":
                if accounting is None:
                    raise FileNotFoundError("sacct")
                (number,) = [word.removeprefix("--jobs=") for word in command if word.startswith("--jobs=")]
                return subprocess.CompletedProcess(command, 0, accounting.get(number, ""), "")
            listed = next(left)
            if isinstance(listed, str):
                return subprocess.CompletedProcess(command, 1, "", listed)
            return subprocess.CompletedProcess(command, 0, "\n".join(listed) + "\n", "")

        monkeypatch.setattr(slurm.subprocess, "run", asked)
        said = []
        return slurm.wait("7", said.append, interval=0.0), said

    return run


def test_a_failure_counts_that_the_last_list_has_forgotten(waited):
    first = [entry("0", "FAILED", "3:0"), entry("1-2%1", "PENDING")]
    second = [entry("1", "RUNNING"), entry("2", "PENDING")]
    code, said = waited(first, second, [entry("1", "COMPLETED"), entry("2", "RUNNING")], [entry("2", "COMPLETED")])
    assert code == 3
    assert said[:2] == ["job 7_0: failed", "job 7_1-2%1: pending"] and said[-1] == "job 7_2: completed"


def test_a_job_that_ended_well_and_is_forgotten_is_asked_of_the_accounting(waited):
    running = [entry("0", "COMPLETED"), entry("1", "RUNNING")]
    assert waited(running, GONE, accounting={"7_1": "COMPLETED|0:0\n"})[0] == 0
    assert waited(running, GONE, accounting={"7_1": "CANCELLED by 0|0:15\n"})[0] == 143
    assert waited(running, GONE, accounting={"7_1": "PREEMPTED|0:0\n"})[0] == 1


@pytest.mark.parametrize("accounting", [None, {}])
def test_an_end_that_nobody_knows_is_a_failure_and_said(waited, accounting):
    assert waited([entry("1", "RUNNING")], GONE, accounting=accounting) == (1, ["job 7_1: running", "job 7_1: unknown"])


def test_a_controller_that_is_silent_for_a_while(waited):
    silent = "slurm_load_jobs error: Unable to contact slurm controller"
    assert waited([entry("1", "RUNNING")], silent, silent, [entry("1", "COMPLETED")])[0] == 0
    with pytest.raises(RunError, match="no longer reports on job 7"):
        waited(silent)
