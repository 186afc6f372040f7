"""Standard output that is closed, full, ASCII only or read no further: no traceback, the right exit code, and every file written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lora_jax.cli import sweep
from lora_jax.cli.options import READER_GONE
from lora_jax.config.load import load_config
from lora_jax.errors import RunError
from lora_jax.tracking import MemberResult

CODE = "import sys; from lora_jax.cli.main import main; sys.argv[0] = 'lora-jax'; main()"
UNBUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}


def run(arguments, *, shell="", **environment):
    command = f'exec "{sys.executable}" -c "{CODE}" {arguments} {shell}'
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=UNBUFFERED | environment, timeout=120)


@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        pytest.param(">&-", 0, "warning: standard output is closed", marks=pytest.mark.slow),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: cannot write to standard output"),
    ],
)
def test_output_that_goes_nowhere(shell, code, told):
    done = run("schema", shell=shell)
    assert done.returncode == code and done.stderr.startswith(told) and len(done.stderr.splitlines()) <= 1, done


def test_a_reader_that_leaves_early_ends_the_command():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", CODE, "schema"], stdout=writing, stderr=subprocess.PIPE, text=True, env=UNBUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_a_log_that_is_read_no_further_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", CODE, "train", "none.yaml"], stdout=subprocess.PIPE, stderr=writing, env=UNBUFFERED)
    os.close(writing)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.slow
def test_ascii_only_output_gets_escapes(tmp_path):
    for rank, value in ((2, 0.5), (2, 0.6)):
        settings = {"adapter.rank": rank, "training.seed": int(10 * value)}
        MemberResult(f"{value}", settings, 10, "finished", {"accuracy": value}).write(tmp_path / f"{value}")
    (tmp_path / "config.yaml").write_text("name: r\n")
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "1", "LC_ALL": "C", "PYTHONUTF8": "0"}):
        done = run(f"compare {tmp_path}", **environment)
        assert done.returncode == 0 and "Traceback" not in done.stderr and "55.0" in done.stdout, done
    assert "55.0 \\xb1 63.5" in run(f"compare {tmp_path}", PYTHONIOENCODING="ascii").stdout


class Gone(io.StringIO):
    def write(self, text):
        raise SystemExit(READER_GONE)


@pytest.mark.parametrize(("status", "ends"), [("finished", SystemExit), ("failed", RunError)])
def test_files_are_written_before_tables_and_failures_are_told_all_the_same(tmp_path, monkeypatch, status, ends):
    (tmp_path / "a.yaml").write_text(
        "name: a\nmodel: {source: m}\ntask: {kind: classification, source: d.csv, text: t, label: l}\ntraining: {steps: 1}\n"
    )
    config, path = load_config(tmp_path / "a.yaml"), tmp_path / "run"
    results = [MemberResult("m", {}, 1, "finished", {"accuracy": 0.5}), MemberResult("n", {}, 1, status, {"accuracy": 0.5})]
    for result in results:
        result.write(path / result.name)
    (path / "config.yaml").write_text("name: a\n")
    outcome = SimpleNamespace(path=path, results=results, compiled_programs=2, unfinished=0)
    monkeypatch.setattr("lora_jax.sweeps.run.run_sweep", lambda *_, **__: outcome)
    monkeypatch.setattr(sweep, "join", lambda _: None)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(ends):
        sweep.run_and_report(config, solo=True, fresh=False, joining=None)
    assert (path / "report.html").is_file() and (path / "summary.csv").is_file()
