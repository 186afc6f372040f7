"""Jobs on a Slurm cluster, through submitit: one run of several tasks, or a sweep as an array of parts.

submitit hands a job over as a pickle in the run's `logs/`: it holds a `Job` below, that is words of a command, and is read by the job
itself, from a folder that only who submitted it can write to. Nothing comes back that way: how a job ended is asked of Slurm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.helpers import Checkpointable, DelayedSubmission

from ..errors import InputError, RunError
from .local import STOPPED

_WAITING = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SIGNALING",
    "STAGE_OUT",
    "PREEMPTED",
)


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What to ask Slurm for; what is None is left to the cluster.

    Attributes:
        nodes, tasks_per_node: their product is how many processes run the program together, in each job.
        time: the limit, `minutes`, `hours:minutes:seconds` or `days-hours:minutes:seconds`.
        setup: shell lines before the program starts.
        sbatch: more of sbatch's options, without the dashes, by name.
    """

    partition: str | None = None
    account: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem: str | None = None
    time: str = "60"
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Job(Checkpointable):
    """What each task of a job does: it runs a command in a process of its own.

    When the time limit is near submitit asks for a checkpoint and puts the job back into the queue, where it goes on later.

    Args:
        command: the words.
        environment: variables to set.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.command, self.environment = list(command), dict(environment)
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        # Slurm signals every process of a task. SIGTERM is for the command; SIGUSR2, the time limit's, is for submitit alone.
        ignore = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._child = subprocess.Popen(self.command, env=os.environ | self.environment, preexec_fn=ignore)
        code = _wait(self._child)
        if code in STOPPED and os.environ.get("SLURM_PROCID", "0") != "0":
            time.sleep(60)  # task 0 may be putting the job back into the queue, which ends this one
        if code:
            sys.exit(code)  # the job's own exit code, for Slurm and for who depends on it

    def checkpoint(self) -> DelayedSubmission:
        """The same job again, after what runs has saved everything and ended."""
        if self._child is not None:
            self._child.terminate()
            _wait(self._child)
        return DelayedSubmission(Job(self.command, self.environment))


def _wait(child: subprocess.Popen[bytes]) -> int:
    # Not child.wait(): a signal's handler, which waits too, would find its lock taken.
    while (code := child.poll()) is None:
        time.sleep(0.1)
    return code if code >= 0 else 128 - code


def submit(
    commands: Sequence[Sequence[str]], options: SlurmOptions, *, name: str, logs: Path, environment: Mapping[str, str] | None = None
) -> str:
    """Submits one job, or an array with a job for each of several commands; returns Slurm's number of it.

    Args:
        commands: words of each.
        options: what to ask Slurm for, for each.
        name: the job's name.
        logs: a folder on a disk that all nodes see. Each job's output goes to a folder below, of its number.
        environment: variables to set.

    Raises:
        RunError: there is no Slurm here, or it refused.
        InputError: an option is not of its form.
    """
    if not _installed("sbatch"):
        raise RunError("--on slurm: sbatch is not here; run this on a machine of the cluster from which jobs are submitted.")
    executor = SlurmExecutor(folder=logs / "%j", max_num_timeout=1000)  # back into the queue as often as it takes
    jobs = [Job(command, environment or {}) for command in commands]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what sbatch says, which is told below
            executor.update_parameters(**_parameters(options, name))
            if len(jobs) == 1:
                return executor.submit(jobs[0]).job_id
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
            return submitted[0].job_id.partition("_")[0]
    except Exception as error:  # submitit wraps what sbatch said in errors of its own
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise RunError("Slurm did not take the job: " + "\n".join(lines[-3:])) from None


def _installed(program: str) -> bool:
    return any(os.access(Path(folder) / program, os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep))


def _parameters(options: SlurmOptions, name: str) -> dict[str, Any]:
    """What submitit calls them."""
    asked = {
        "job_name": name,
        "partition": options.partition,
        "account": options.account,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks_per_node,
        "cpus_per_task": options.cpus_per_task,
        "gpus_per_node": options.gpus_per_node,
        "mem": options.mem,
        "time": minutes(options.time),
        "setup": list(options.setup) or None,
        "additional_parameters": dict(options.sbatch) or None,
        # One task that fails ends the others, which would wait for it for ever. And srun asks anew for what sbatch was given.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else [])],
    }
    return {key: value for key, value in asked.items() if value is not None}


def minutes(text: str) -> int:
    """A time limit in whole minutes, rounded up.

    >>> minutes("90"), minutes("1:30:00"), minutes("2-00:00:30")
    (90, 90, 2881)

    Raises:
        InputError: it is no such time.
    """
    found = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not found:
        raise InputError(f"--time: '{text}' is not MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS.")
    if found[1]:
        return int(found[1])
    days, hours, whole, seconds = (int(g or 0) for g in found.groups()[1:])
    return (days * 24 + hours) * 60 + whole + (seconds > 0)


def wait(job: str, say: Callable[[str], None], *, interval: float = 5.0) -> int:
    """Waits until a job, or every job of an array, has ended.

    Args:
        job: Slurm's number of it.
        say: told of each change of state.
        interval: seconds between looks.

    Returns:
        0, or the exit code of the first that failed; 1 where Slurm has none for it, as after a time limit.

    Raises:
        RunError: Slurm cannot be asked.
    """
    told: dict[str, str] = {}
    while True:
        states = _states(job)
        for one, (state, _) in states.items():
            if told.get(one) != state:
                say(f"job {one}: {state.lower()}")
                told[one] = state
        if all(state not in _WAITING for state, _ in states.values()):
            failed = [code for state, code in states.values() if state != "COMPLETED"]
            return (failed[0] or 1) if failed else 0
        time.sleep(interval)


def _states(job: str) -> dict[str, tuple[str, int]]:
    """Number of each job -> (state, exit code). An array's tasks that wait together are one."""
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    if asked.returncode:
        raise RunError(f"Slurm no longer answers for job {job}: {asked.stderr.strip() or asked.stdout.strip()}")
    states = {}
    for line in asked.stdout.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        task = facts.get("ArrayTaskId")
        code, _, ended_by = facts["ExitCode"].partition(":")
        number = f"{facts['ArrayJobId']}_{task}" if task else facts["JobId"]
        states[number] = (facts["JobState"], int(code) or (128 + int(ended_by) if int(ended_by) else 0))
    return states
