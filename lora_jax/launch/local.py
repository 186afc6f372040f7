"""Several processes of one program on this machine: started together, ended together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from ..errors import RunError
from ..parallel import processes

# Exit codes of a run that was told to stop (SIGTERM, Ctrl-C), and saved everything.
STOPPED = (75, 130)
_SAVING_SECONDS = 120.0  # how long the others of such a run may still take
_POLL_SECONDS = 0.1
_FORCE_DEVICES = "--xla_force_host_platform_device_count"


def virtual_devices(count: int, env: Mapping[str, str]) -> dict[str, str]:
    """What to set so that a process sees its CPU as `count` devices.

    >>> virtual_devices(4, {})
    {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
    """
    others = re.sub(rf"{_FORCE_DEVICES}=\d+", "", env.get("XLA_FLAGS", "")).split()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, f"{_FORCE_DEVICES}={count}"])}


def run_locally(command: Sequence[str], count: int, *, logs: Path, environment: Mapping[str, str] | None = None, grace: float = 5.0) -> int:
    """Runs `count` processes of a command as one program, and returns when all have ended.

    The first speaks where this process does; the others write to `logs/process-1.log` and so on. SIGTERM and SIGINT are passed on to
    all. When one fails the others are ended too, since they would wait for it for ever.

    Args:
        command: words of a command that takes part in what `parallel/processes.py` describes.
        count: how many.
        logs: a folder; made if missing.
        environment: variables to set, beside those that tell the processes of one another.
        grace: seconds that the others are given to end by themselves when one has failed.

    Returns:
        0, or the exit code of the process that failed first; 128 + n where signal n ended it.

    Raises:
        RunError: the command cannot be started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(environment or {}), processes.COORDINATOR: f"127.0.0.1:{_free_port()}", processes.PROCESS_COUNT: str(count)}
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files, _passing_on(started):
        try:
            for i in range(count):
                output = None if i == 0 else files.enter_context(open(logs / f"process-{i}.log", "ab"))
                # A group of its own: Ctrl-C then reaches each once, from here.
                started.append(
                    subprocess.Popen(
                        command,
                        env=shared | {processes.PROCESS_ID: str(i)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output and subprocess.STDOUT,
                        process_group=0,
                    )
                )
            code = _first_failure(started)
            if code in STOPPED:  # the others were told too
                _end(started, _SAVING_SECONDS)
            else:
                _ask_to_end(started)
                _end(started, grace)
        except OSError as error:
            raise RunError(f"cannot start {command[0]}: {error.strerror}") from None
        finally:
            for process in started:  # whatever happened here, none is left behind
                if process.poll() is None:
                    process.kill()
                    process.wait()
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first_failure(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended well (0) or one has not (its exit code)."""
    while True:
        codes = [process.poll() for process in started]
        failed = [(i, code) for i, code in enumerate(codes) if code]
        if failed:
            number, code = failed[0]
            code = code if code > 0 else 128 - code
            if number > 0:
                print(f"process {number} ended with exit code {code}; its log says why.", file=sys.stderr)
            return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _ask_to_end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is None:
            process.terminate()


def _end(started: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Waits for those that still run, and ends them by force when `grace` has passed."""
    until = time.monotonic() + grace
    for process in started:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def _passing_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT go to the processes and not to this one."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
