"""Locks between processes: the whole of a run, or some members' share of it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from lora_jax.errors import InputError
from lora_jax.tracking import files as lock

HOLD = """
import sys
from pathlib import Path
from lora_jax.tracking import files as lock
members = None if sys.argv[2] == "all" else [int(m) for m in sys.argv[2].split(",")]
lock.acquire(Path(sys.argv[1]), members)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Lets another process hold a lock of `tmp_path`."""
    held = []

    def hold(members):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), members], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"held\n"
        held.append(process)
        return process

    yield hold
    lock.release(tmp_path)
    for process in held:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        pytest.param("all", None, True, marks=pytest.mark.slow),
        pytest.param("all", [3], True, marks=pytest.mark.slow),
        pytest.param("0,1", None, True, marks=pytest.mark.slow),
        ("0,1", [1, 2], True),
        ("0,1", [2, 3], False),
        pytest.param("0,2", [1, 3], False, marks=pytest.mark.slow),
    ],
)
def test_what_excludes_what(other, tmp_path, theirs, ours, refused):
    other(theirs)
    if refused:
        with pytest.raises(InputError, match="another process is writing to this run"):
            lock.acquire(tmp_path, ours)
    else:
        lock.acquire(tmp_path, ours)


def test_one_refused_leaves_nothing_held(other, tmp_path):
    other("2")
    with pytest.raises(InputError):
        lock.acquire(tmp_path, [0, 1, 2])
    other("0,1")


def test_the_end_of_a_process_gives_its_lock_back(other, tmp_path):
    process = other("all")
    process.kill()
    process.wait()
    lock.acquire(tmp_path)


@pytest.mark.slow
def test_turns_wait_for_one_another(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lora_jax.tracking import files as lock\n"
        "with lock.turn(Path(sys.argv[1])): print('in', flush=True); time.sleep(1.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    lock.acquire(tmp_path, [0])
    began = time.monotonic()
    with lock.turn(tmp_path):
        assert time.monotonic() - began > 0.5
    process.communicate()
    # The turn's end has not given back what is held of the run itself.
    try:
        told = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path), "0"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert "another process is writing to this run" in told.stderr
    finally:
        lock.release(tmp_path)


def test_a_link_is_no_lock(tmp_path):
    """What it points to is not made."""
    for name in (".lock", ".turn"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\.lock: is a link"):
        lock.acquire(tmp_path)
    with pytest.raises(InputError, match=r"\.turn: is a link"), lock.turn(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
