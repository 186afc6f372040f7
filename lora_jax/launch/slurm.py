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
        raise RunError("--on slurm: sbatch was not found; run this on a login node of the cluster.")
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
        raise RunError("Slurm rejected the job: " + "\n".join(lines[-3:])) from None


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

    Slurm's list of jobs holds one for some minutes after its end only, so the last list says nothing of those that ended long before:
    each job's end is kept when it is seen, and asked of the accounting (`sacct`) where it was not.

    Args:
        job: Slurm's number of it.
        say: told of each change of state.
        interval: seconds between looks.

    Returns:
        0, or the exit code of the first that failed; 1 where Slurm has none for it, as after a time limit, or does not know its end.

    Raises:
        RunError: Slurm cannot be asked.
    """
    told: dict[str, str] = {}
    known: dict[str, tuple[str, int]] = {}
    silent = 0
    while True:
        listed: set[str] = set()
        try:
            for label, numbers, state, code in _listed(job):
                known |= dict.fromkeys(numbers, (state, code))
                listed |= set(numbers)
                if told.get(label) != state:
                    say(f"job {label}: {state.lower()}")
                    told[label] = state
            silent = 0
            if not known:
                raise RunError(f"Slurm has no record of job {job}.")
        except RunError:
            silent += 1  # a controller that starts again is silent for a while
            if not known or silent > _SILENT_LOOKS:
                raise
        else:
            for one in [n for n, (state, _) in known.items() if state in _WAITING and n not in listed]:
                known[one] = _accounted(one)
                say(f"job {one}: {known[one][0].lower()}")
        if known and all(state not in _WAITING for state, _ in known.values()):
            failed = [code for state, code in known.values() if state != "COMPLETED"]
            return (failed[0] or 1) if failed else 0
        time.sleep(interval)


_SILENT_LOOKS = 24


def _listed(job: str) -> list[tuple[str, list[str], str, int]]:
    """What Slurm lists of a job: as it calls each entry, the jobs in it, their state and exit code. An array's that wait are one entry."""
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip() or asked.stdout.strip()
        if "Invalid job id" in said:  # none is in the list any more
            return []
        raise RunError(f"Slurm no longer reports on job {job}: {said}")
    found = []
    for line in asked.stdout.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" not in facts:
            continue
        task = facts.get("ArrayTaskId")
        label = f"{facts['ArrayJobId']}_{task}" if task else facts["JobId"]
        numbers = [f"{facts['ArrayJobId']}_{n}" for n in _tasks(task)] if task else [label]
        found.append((label, numbers, facts["JobState"], _exit_code(facts["ExitCode"])))
    return found


def _tasks(text: str) -> list[int]:
    """The numbers in an entry of an array.

    >>> _tasks("0-2,7%3"), _tasks("4")
    ([0, 1, 2, 7], [4])
    """
    ends = [part.split(":")[0].partition("-") for part in text.partition("%")[0].split(",")]
    return [n for first, _, last in ends for n in range(int(first), int(last or first) + 1)]


def _exit_code(text: str) -> int:
    code, _, ended_by = text.partition(":")
    return int(code) or (128 + int(ended_by) if int(ended_by or 0) else 0)


def _accounted(number: str) -> tuple[str, int]:
    """How a job ended that is not listed any more; `UNKNOWN`, which is a failure, where there is no accounting or it does not say."""
    try:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode"]
        asked = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "UNKNOWN", 1
    lines = asked.stdout.split("\n")
    state, _, code = lines[0].strip().partition("|")
    if asked.returncode or not state or not re.fullmatch(r"\d+:\d+", code):
        return "UNKNOWN", 1
    state = state.split()[0]  # `CANCELLED by 0`
    return ("PREEMPTED, not put back" if state == "PREEMPTED" else state), _exit_code(code)
