"""Processes on this machine, with small scripts in place of training: what they are told, who is heard, how they end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lora_jax.errors import RunError
from lora_jax.launch.local import run_locally, virtual_devices

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Most scripts want their number.
NUMBER = "import os, sys, time, signal; number = int(os.environ['LORA_JAX_PROCESS_ID'])\n"


def run(script, count, folder, **options):
    return run_locally([sys.executable, "-c", NUMBER + script], count, logs=folder / "logs", **options)


def test_each_process_is_told_of_the_others(tmp_path):
    script = "import json; json.dump({k: v for k, v in os.environ.items() if k.startswith('LORA')}, open(f'{sys.argv[1]}/{number}', 'w'))"
    command = [sys.executable, "-c", NUMBER + script, str(tmp_path)]
    assert run_locally(command, 3, logs=tmp_path / "logs", environment={"LORA_OTHER": "x"}) == 0
    told = [json.loads((tmp_path / str(i)).read_text()) for i in range(3)]
    assert [t.pop("LORA_JAX_PROCESS_ID") for t in told] == ["0", "1", "2"]
    assert told[0] == told[1] == told[2]
    assert told[0]["LORA_JAX_PROCESS_COUNT"] == "3" and told[0]["LORA_OTHER"] == "x"
    host, port = told[0]["LORA_JAX_COORDINATOR"].split(":")
    assert host == "127.0.0.1" and int(port) > 1023


def test_the_first_is_heard_and_the_others_are_written_down(tmp_path, capfd):
    script = "print('said by', number, flush=True); print('complaint of', number, file=sys.stderr)"
    assert run(script, 3, tmp_path) == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("said by 0\n", "complaint of 0\n")
    for i in (1, 2):
        assert (tmp_path / "logs" / f"process-{i}.log").read_text().splitlines() == [f"said by {i}", f"complaint of {i}"]
    assert not (tmp_path / "logs" / "process-0.log").exists()


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_one_failure_ends_all(tmp_path, capfd, ending, code):
    began = time.monotonic()
    assert run(f"time.sleep(0.3); {ending} if number == 1 else time.sleep(60)", 3, tmp_path) == code
    assert time.monotonic() - began < 20
    assert f"process 1 ended with exit code {code}; its log says why." in capfd.readouterr().err


def test_one_that_does_not_listen_is_ended_by_force(tmp_path):
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if number == 0 else (time.sleep(1), sys.exit(3)); time.sleep(60)"
    began = time.monotonic()
    assert run(script, 2, tmp_path, grace=0.5) == 3
    assert time.monotonic() - began < 20


def test_one_that_was_told_to_stop_waits_for_the_others(tmp_path):
    # Exit code 75: everything is saved. The other is still saving, and must not be told twice.
    script = (
        "signal.signal(signal.SIGTERM, lambda *a: os._exit(9))\n"
        "time.sleep(0 if number == 1 else 1.5)\n"
        "open(f'{sys.argv[1]}/{number}', 'w')\n"
        "sys.exit(75)"
    )
    assert run_locally([sys.executable, "-c", NUMBER + script, str(tmp_path)], 2, logs=tmp_path / "logs") == 75
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_once(tmp_path, number):
    heard = (
        "heard = []\n"
        "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda n, f: heard.append(n))\n"
        "open(f'{sys.argv[1]}/{number}', 'w').close()\n"
        "while not heard: time.sleep(0.05)\n"
        "time.sleep(0.5); open(f'{sys.argv[1]}/{number}', 'w').write(str([int(n) for n in heard])); sys.exit(75)"
    )
    launcher = (
        "import sys; from pathlib import Path; from lora_jax.launch.local import run_locally\n"
        "sys.exit(run_locally([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2, logs=Path(sys.argv[2]) / 'logs'))"
    )
    command = [sys.executable, "-c", launcher, NUMBER + heard, str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT})
    until = time.monotonic() + 60
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == [f"[{int(number)}]"] * 2


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="cannot start no-such-program"):
        run_locally(["no-such-program"], 2, logs=tmp_path / "logs")


def test_virtual_devices_replace_a_count_and_keep_the_rest():
    flags = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"}
    assert virtual_devices(4, flags)["XLA_FLAGS"] == "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4"
