"""Many processes, one program: how they find one another, which of them writes, how they agree, and how they are asked to stop.

Every process runs the same program on the same data; only what lies on its own devices differs. One process is the ordinary case
and pays nothing: JAX is imported here when there are several.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ..errors import InputError, RunError, Stopped

T = TypeVar("T")

# What `lora-jax launch` sets for the processes it starts; the options of `train` and `sweep` read them too.
COORDINATOR, PROCESS_ID, PROCESS_COUNT, START_TIMEOUT = (
    f"LORA_JAX_{name}" for name in ("COORDINATOR", "PROCESS_ID", "PROCESS_COUNT", "START_TIMEOUT")
)

# Seconds by which process 0 outlives its failure: the end of the coordinator ends all others, and those that failed alike, as on wrong
# input, would not come to say so.
_LAST_WORDS = 2.0


@dataclasses.dataclass(frozen=True)
class Joining:
    """How a process was told to join the others.

    Attributes:
        coordinator: `host:port` at which process 0 listens.
        index: this process's number, from 0.
        count: how many processes there are; 1 looks for no others, whatever cluster this is.
        timeout: seconds to wait for the others.
    """

    coordinator: str | None = None
    index: int | None = None
    count: int | None = None
    timeout: float = 300.0


@dataclasses.dataclass
class _Joined:
    """What this process is: number `index` of `count`."""

    index: int = 0
    count: int = 1


_joined = _Joined()


def join(joining: Joining, env: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of several, where it was started as one; to be called before anything asks JAX for its devices.

    With coordinator, number and count those are used; with none of them JAX looks for a cluster (Slurm, Open MPI, Kubernetes,
    Cloud TPU), where the environment shows signs of one with several processes.

    Raises:
        InputError: only some of the three are given, or they contradict one another.
        RunError: the others were not there in time.
    """
    explicit = _explicit(joining)
    cluster = None if explicit or joining.count == 1 else find_cluster(env)
    if not explicit and cluster is None:
        return
    _joined.count = joining.count or 2  # from here on a failure must not wait for the others; JAX says below how many there are

    import jax

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                joining.coordinator,
                joining.count,
                joining.index,
                cluster_detection_method="deactivate" if explicit else None,
                # JAX ends the process when its own time is up; ours, below, comes first.
                initialization_timeout=int(joining.timeout) + 60,
            )
        except Exception as error:  # Kubernetes' client and JAX raise many kinds
            failures.append(error)

    failures: list[Exception] = []
    thread = threading.Thread(target=initialize, name="join", daemon=True)
    thread.start()
    thread.join(joining.timeout)
    where = f"the coordinator at {joining.coordinator}" if explicit else f"the other processes of this {cluster} job"
    if thread.is_alive():
        own = f"process {joining.index} of {joining.count}: " if explicit else ""
        waited = f"waited {joining.timeout:g} s for {where}, and not all processes came."
        advice = "Start all of them, at an address that each can reach. "
        raise RunError(f"{own}{waited}\n{advice}--start-timeout waits longer; --process-count 1 runs alone.")
    if failures:
        reason = next(iter(str(failures[0]).strip().splitlines()), type(failures[0]).__name__)
        advice = "Give --coordinator, --process-id and --process-count, or --process-count 1 to run alone."
        raise RunError(f"could not join {where}: {reason}" + ("" if explicit else f"\n{advice}"))
    _joined.index, _joined.count = jax.process_index(), jax.process_count()


def _explicit(joining: Joining) -> bool:
    """Whether a process was told where the others are."""
    given = {"--coordinator": joining.coordinator, "--process-id": joining.index, "--process-count": joining.count}
    missing = [name for name, value in given.items() if value is None]
    if joining.count == 1 or len(missing) == len(given):
        return False
    if missing:
        raise InputError(f"--coordinator, --process-id and --process-count go together; missing: {', '.join(missing)}.")
    assert joining.coordinator is not None and joining.index is not None and joining.count is not None
    host, _, port = joining.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator: '{joining.coordinator}' is not HOST:PORT, such as 10.0.0.1:9876.")
    if not 0 <= joining.index < joining.count:
        raise InputError(f"--process-id: {joining.index}, but the processes are 0 to {joining.count - 1}.")
    return True


def find_cluster(env: Mapping[str, str]) -> str | None:
    """The kind of cluster that started this process as one of several, by signs that cost nothing to look for; None without one.

    >>> find_cluster({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"})
    'Slurm'
    >>> find_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})
    """
    if "SLURM_STEP_NODELIST" in env and _number(env, "SLURM_NTASKS") > 1:
        return "Slurm"
    if _number(env, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if _number(env, "MEGASCALE_NUM_SLICES") > 1 or (hosts is not None and "," in hosts):
        return "Cloud TPU"
    # On a TPU machine without Kubernetes only its metadata server knows of others.
    if hosts is None and env.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _has_tpu():
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:  # an indexed job, as a JobSet makes them
        return "Kubernetes"
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    return int(env[name]) if env.get(name, "").isdecimal() else 0


def _has_tpu() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_writer() -> bool:
    """Whether this is the process that writes files and speaks: the only one, or process 0."""
    return _joined.index == 0


def process_count() -> int:
    """How many processes run this program."""
    return _joined.count


def writer_says(value: bool) -> bool:
    """What the writing process says, in all; the others' own value is not looked at."""
    if _joined.count == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def writer_first(action: Callable[[], T]) -> T:
    """Runs `action` in the writing process and, when it is done there, in the others.

    Raises:
        RunError: in the others, if it failed in the first, which tells why. Its own failure is raised as it is.
    """
    if _joined.count == 1:
        return action()
    if not is_writer():
        if not writer_says(True):
            raise RunError("process 0 failed; see its output.")
        return action()
    try:
        result = action()
    except BaseException:
        writer_says(False)
        raise
    writer_says(True)
    return result


def leave(code: int) -> None:
    """Ends the process, with this exit code. One of several leaves at once: the others may be waiting for it, and it for them."""
    if _joined.count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if is_writer():
            time.sleep(_LAST_WORDS)
        os._exit(code)
    sys.exit(code)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While it is entered, the two signals are noted in place of ending the process; a second one ends it at once.

    Outside the main thread, where Python allows no handlers, nothing is changed. Of several processes each leaves SIGTERM to JAX,
    which tells the others; Ctrl-C is made one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False  # before the first step there is nothing to save, and no reason to wait
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            noted = _SIGNALS if process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._on_signal) for number in noted}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception):  # it may be what callbacks of C++ code made of a stop
            try:
                self.check(error)
            except Stopped as stopped:
                stopped.signal = self.received or stopped.signal
                raise
        if isinstance(error, Stopped) and self.received is not None:
            error.signal = self.received

    def asked(self, step: int) -> bool:
        """Whether to stop after `step` steps: of several processes, all say so after the same step."""
        if process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def check(self, cause: BaseException | None = None) -> None:
        """Stops here where a signal came before training, and what ran then kept `Stopped` to itself, as callbacks of C++ code do.

        Raises:
            Stopped: it did.
        """
        if self.received is not None and not self.training and process_count() == 1:
            raise Stopped(0) from cause

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        elif not self.training:
            raise Stopped(0)
